"""How long ``model.audit()`` takes on a model of a billion parameters, on this machine.

python benchmarks/audit.py                        OLMoE-shaped, 1.0 B parameters, float32
python benchmarks/audit.py --dtype bfloat16 --rounds 5
"""

import argparse
import statistics
import time

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_interp as moe


def olmoe(dtype: torch.dtype) -> OlmoeForCausalLM:
    """Hidden 1024, expert width 512, vocabulary 32,000, 9 layers, 64 experts, top-8; random."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    config = OlmoeConfig(
        vocab_size=32_000, eos_token_id=1, hidden_size=1024, intermediate_size=512, num_hidden_layers=9,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


def main() -> None:
    """Print the seconds of each round and their median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    hf = olmoe(getattr(torch, options.dtype))
    size = sum(parameter.numel() for parameter in hf.parameters())
    ids = torch.randint(32_000, (2, 16))
    seconds = []
    with moe.wrap(hf) as model:
        for _ in range(options.rounds):
            start = time.perf_counter()
            with torch.no_grad():
                hf(input_ids=ids, use_cache=False)
            forward = time.perf_counter() - start
            start = time.perf_counter()
            audit = model.audit()
            seconds.append(time.perf_counter() - start)
            verdict = "passed" if audit.passed else "FAILED"
            print(f"{size / 1e9:.2f} B parameters, {options.dtype}: audit {verdict} in {seconds[-1]:.1f} s "
                  f"({seconds[-1] / forward:.0f} plain forwards of 2 x 16 tokens)", flush=True)  # fmt: skip
    print(f"median {statistics.median(seconds):.1f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
