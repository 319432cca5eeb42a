"""Which experts of the bundled model know that "He ..." goes on with "he"? The worked example of docs/patching.md.

Run it with `python examples/patching.py` (under a minute on one core); it prints the figures of that page.
"""

import moe_interp as moe

VERBS = ("said", "knew", "thought", "wrote", "told them", "believed", "saw", "learned")
CLEAN, CORRUPTED = ([f"{who} {verb} that" for verb in VERBS] for who in ("He", "She"))


def main() -> None:
    model = moe.load()
    metric = moe.LogitDifference(" he", " she")

    def patched(**options):
        return moe.activation_patching(model, CLEAN, CORRUPTED, metric, **options)

    by_position, by_expert = patched(over="positions"), patched(over="experts")
    print(f"clean {by_expert.clean.mean():.2f}, corrupted {by_expert.corrupted.mean():.2f} logits")
    print("\nresid_post restored at one token, share of the difference that comes back:")
    print(by_position.normalised_overall.isel(position=slice(1, 5)).to_pandas().round(2).to_string())

    print("\nexperts restored one at a time, the five that matter most:")
    shares = by_expert.normalised_overall.to_series().dropna()
    strongest = list(shares[shares.abs().sort_values(ascending=False).index][:5].index)
    for layer, expert in strongest:
        one = by_expert.sel(layer=layer, expert=expert)
        low, high = one.normalised_interval.values
        print(
            f"  {layer}.{expert}: {one.normalised_overall:.3f} [{low:.3f}, {high:.3f}], {int(one.tokens.sum())} tokens"
        )
    print(f"  restored nothing: {int((by_expert.tokens.sum('text') == 0).sum())} of {shares.size} experts")

    print("\nroutes restored, values left to the corrupted run, by layer:")
    print("  " + ", ".join(f"{share:.3f}" for share in patched(over="routes").normalised_overall.values))
    print("heaviest slot restored, by layer:")
    print("  " + ", ".join(f"{share:.3f}" for share in patched(over="ranks").normalised_overall.sel(rank=1).values))

    sender = strongest[0]
    print(f"\npaths from expert {sender[0]}.{sender[1]}:")
    for receivers in ("logits", "routers", "experts"):
        path = moe.path_patching(model, CLEAN, CORRUPTED, sender, receivers, metric).normalised_overall
        if receivers == "experts":
            flat = path.to_series().dropna()
            best = flat.abs().idxmax()
            print(f"  to expert {best[0]}.{best[1]}, the strongest of {flat.size}: {flat[best]:.4f}")
        else:
            print(f"  to {receivers}: " + ", ".join(f"{share:.4f}" for share in path.values.reshape(-1)))

    trace = moe.causal_trace(model, "He said that", "He", " he", samples=10)
    print(f"\ncausal trace: clean {float(trace.clean):.3f}, corrupted {float(trace.corrupted.mean()):.3f}")
    low, high = trace.total_interval.values
    print(f"  to bring back: {float(trace.total_mean):.3f} [{low:.3f}, {high:.3f}]")
    effects = trace.effect_mean.to_series().dropna().sort_values(ascending=False)
    for layer, expert in effects.index[:3]:
        low, high = trace.effect_interval.sel(layer=layer, expert=expert).values
        print(f"  {layer}.{expert} restored: {effects[layer, expert]:.3f} [{low:.3f}, {high:.3f}]")
    for point in trace.point.values:
        print(f"  {point} of layer 1 restored: {float(trace.control_mean.sel(layer=1, point=point)):.3f}")

    together = moe.coalitions(model, CLEAN, strongest[:4], metric, size=4)
    print("\nablated, effect and interaction in logits:")
    for name in together.coalition.values[:10]:
        one = together.sel(coalition=name)
        low, high = one.interaction_interval.values
        print(f"  {name}: {one.effect_mean:.3f}, interaction {one.interaction_mean:.3f} [{low:.3f}, {high:.3f}]")
    print(
        "  Shapley: "
        + ", ".join(f"{one} {together.shapley_mean.sel(expert=one):.3f}" for one in together.expert.values)
    )


if __name__ == "__main__":
    main()
