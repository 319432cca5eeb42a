"""The profile of one expert as text or HTML, and a page of them all. Tokens and texts are untrusted and escaped."""

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import xarray as xr

from moe_interp.arguments import checked
from moe_interp.errors import BadInput, UnknownName
from moe_interp.results import provenance_of
from moe_interp.views.page import template, write
from moe_interp.views.tables import between, several
from moe_interp.views.tokens import shown

_LEVEL = 0.05


@dataclass(frozen=True, repr=False)
class Profile:
    """What is known of one expert, ready to be read; ``print`` it, or let a notebook show it.

    Attributes:
        layer, expert: which.
        summary: load, weight and output beside what they are compared with.
        over: over-represented tokens with z and count; frequent: tokens with their count. Those of its own alone.
        over_null: the z that the first of them would have by chance.
        domains: name, share in per cent, its interval, p; the largest first.
        partners: expert and lift; none of an expert that was never chosen.
        heaviest, random: contexts, the token between « and ».
    """

    layer: int
    expert: int
    summary: str
    over: list[tuple[str, float, int]]
    over_null: float
    frequent: list[tuple[str, int]]
    domains: list[tuple[str, float, float, float, float]]
    partners: list[tuple[int, float]]
    heaviest: list[str]
    random: list[str]

    def __repr__(self) -> str:
        return f"Profile of layer {self.layer}, expert {self.expert}: {self.summary}. print() shows all of it."

    def __str__(self) -> str:
        over = "  ".join(f"{shown(token)} {z:.1f} ({count})" for token, z, count in self.over)
        frequent = "  ".join(f"{shown(token)} {count}" for token, count in self.frequent)
        domains = [
            f"  {shown(name, 40)}: {share:.1f} % {between(low, high, 1)}" + (" *" if p <= _LEVEL else "")
            for name, share, low, high, p in self.domains
        ]
        partners = ", ".join(f"{expert} ({lift:.1f}x)" for expert, lift in self.partners)
        return "\n".join(
            [
                f"layer {self.layer}, expert {self.expert}: {self.summary}",
                f"over-represented tokens, z (count); by chance the first would have {self.over_null:.1f}:",
                f"  {over or '–'}",
                f"most frequent tokens: {frequent or '–'}",
                "domains, % of their tokens (* more than others, p <= 0.05 over the layer's experts):",
                *domains,
                f"chosen together with: {partners or '–'}",
                "where its weight is largest:",
                *(f"  {shown(text, 160)}" for text in self.heaviest),
                "at random:",
                *(f"  {shown(text, 160)}" for text in self.random),
            ]
        )

    def _repr_html_(self) -> str:
        return template("profile.html.j2").render(one=self, level=_LEVEL)


@checked
def profile(profiles: xr.Dataset, layer: int, expert: int) -> Profile:
    """One expert of the result of `moe.expert_profiles`.

    Raises:
        UnknownName: no such layer or expert in it.
        BadInput: another result.
    """
    _check_profiles(profiles)
    if layer not in profiles["layer"].values or expert not in profiles["expert"].values:
        raise UnknownName(
            f"no profile of expert {expert} at layer {layer}",
            expected=f"a layer of {profiles['layer'].values.tolist()}, an expert below {profiles.sizes['expert']}",
            got=f"({layer}, {expert})",
        )
    at = profiles.sel(layer=layer, expert=expert)
    texts = {str(kind): [str(one) for one in at["context"].sel(kind=kind).values if one] for kind in at["kind"].values}
    return Profile(
        layer=int(layer),
        expert=int(expert),
        summary=_summary(at, profiles.sizes["expert"]),
        over=[one for one in _zip(at["over_token"], at["over_z"], at["over_count"]) if one[-1]],
        over_null=float(at["over_z_null"]),
        frequent=[one for one in _zip(at["frequent_token"], at["frequent_count"]) if one[-1]],
        domains=_domains(at),
        partners=[one for one in _zip(at["partner"], at["partner_lift"]) if not isnan(one[-1])],
        heaviest=texts["heaviest"],
        random=texts["random"],
    )


def _check_profiles(profiles: Any) -> None:
    analysis = getattr(profiles, "attrs", {}).get("analysis")
    if analysis != "expert_profiles":
        got = type(profiles).__name__ if analysis is None else f"one of {analysis}"
        raise BadInput("not profiles of experts", expected="a result of moe.expert_profiles", got=got)


def _zip(*columns: xr.DataArray) -> list[tuple[Any, ...]]:
    return list(zip(*(column.values.tolist() for column in columns), strict=True))


def _domains(at: xr.Dataset) -> list[tuple[str, float, float, float, float]]:
    low, high = (100 * at["specialization_interval"].sel(bound=bound).values for bound in ("low", "high"))
    shares = 100 * at["specialization"].values
    rows = zip(
        map(str, at["domain"].values),
        shares.tolist(),
        low.tolist(),
        high.tolist(),
        at["specialization_p"].values.tolist(),
        strict=True,
    )
    return sorted(rows, key=lambda row: -row[1])


def _summary(at: xr.Dataset, experts: int) -> str:
    load = f"{int(at['tokens']):,} tokens, {float(at['load'] / at['load_uniform']):.2f} times an even load"
    parts = [
        f"{name} {float(at[name]):.3g} (rank {int(at[f'{name}_rank'])} of {experts})"
        for name in ("weight", "norm", "contribution")
    ]
    return ", ".join([load, *parts]) if int(at["tokens"]) else f"never chosen ({load})"


def profile_rows(profiles: xr.Dataset) -> list[Profile]:
    """Every expert, layer by layer."""
    return [
        profile(profiles, int(layer), int(expert))
        for layer in profiles["layer"].values
        for expert in profiles["expert"].values
    ]


@checked
def profile_page(profiles: xr.Dataset, path: str | Path) -> Path:
    """Writes one self-contained HTML page with a table over all experts, each with its profile to fold out.

    Raises:
        BadOutput: the file cannot be written.
        BadInput: not a result of `moe.expert_profiles`.
    """
    _check_profiles(profiles)
    target = Path(path)
    text = template("profiles.html.j2").render(
        rows=profile_rows(profiles),
        provenance=provenance_of(profiles),
        baseline=several(100 * profiles["specialization_baseline"], 1),
        level=_LEVEL,
    )
    return write(text, target)
