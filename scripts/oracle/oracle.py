"""Compares VisionEncoder with transformers on tiny random models of every family, in many configurations.

For each variant, transformers builds a model with random weights and computes its hidden states and its pooled output for several sizes, and
those of a photograph where the variant is one of a processor. compare.ts loads the folder, computes the same, and saves the encoder; what it saved is loaded by
transformers again, where no weight may be missing or another one.

Needs: Python 3.11 or later with torch, transformers 5, safetensors and Pillow (torchvision is not used); the package built, and Node.js.
Not part of CI. Run from the root of the repository:

    python scripts/oracle/oracle.py             # all variants; exit code 1 if any differs
    python scripts/oracle/oracle.py dinov3      # those whose name begins so
    python scripts/oracle/oracle.py --keep DIR  # leave the folders in DIR
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from variants import PHOTO, Variant, all_variants


def randomise(model: torch.nn.Module) -> None:
    """Weights with which every part matters: no zero biases, no norms of one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim > 1:
                std = 0.8 * p[0].numel() ** -0.5 if p[0].numel() else 1
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: the last hidden state may be the last layer's output, and files hold no tensor twice."""
    return tensor.clone(memory_format=torch.contiguous_format)


def forward(
    vision: torch.nn.Module, pixels: torch.Tensor, interpolate: bool, projection: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    extra = {"interpolate_pos_encoding": True} if interpolate else {}
    with torch.no_grad():
        out = vision(pixel_values=pixels, output_hidden_states=True, **extra)
        pooled = getattr(out, "pooler_output", None)
        if projection is not None:
            pooled = projection(pooled)
    states = {f"h.{i}": packed(h) for i, h in enumerate(out.hidden_states)}
    return {"last": packed(out.last_hidden_state), **states, **({} if pooled is None else {"pooled": packed(pooled)})}


def build(variant: Variant, folder: Path) -> None:
    """Writes the variant's checkpoint, and golden.safetensors: pixels.HxW, last.HxW, h.HxW.i, pooled.HxW, and those of the photograph."""
    model = variant.model().eval()
    randomise(model)
    model.save_pretrained(folder)
    vision = variant.vision(model)
    projection = variant.projection(model)
    golden = {}
    generator = torch.Generator().manual_seed(11)
    for height, width in variant.sizes:
        pixels = torch.randn(1, 3, height, width, generator=generator)
        size = f"{height}x{width}"
        golden[f"pixels.{size}"] = pixels
        for name, value in forward(vision, pixels, variant.interpolate, projection).items():
            kind, _, number = name.partition(".")
            golden[f"{kind}.{size}{'.' + number if number else ''}"] = value
    if variant.processor:
        processor = variant.processor()
        pixels = processor(Image.open(PHOTO).convert("RGB"), return_tensors="pt")["pixel_values"]
        golden["photo"] = forward(vision, pixels, variant.interpolate)["last"]
        processor.save_pretrained(folder)
    variant.finish(folder)
    save_file(golden, str(folder / "golden.safetensors"))
    save_file({name: p.detach().clone().contiguous() for name, p in vision.state_dict().items()}, str(folder / "vision.safetensors"))


def check_saved(folder: Path) -> list[str]:
    """What transformers finds wrong with what VisionEncoder.save wrote."""
    model, info = AutoModel.from_pretrained(folder / "saved", output_loading_info=True)
    expected = load_file(folder / "vision.safetensors")
    found = model.state_dict()
    problems = [f"{kind}: {', '.join(sorted(map(str, names)))}" for kind, names in info.items() if kind != "error_msgs" and names]
    problems += [f"{name} is not what it was" for name, value in expected.items() if name not in found or not torch.equal(found[name], value)]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny
    variants = [v for v in all_variants() if v.name.startswith(options.prefix)]
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        for i, variant in enumerate(variants):
            print(f"\r{i + 1}/{len(variants)} built", end="", file=sys.stderr)
            build(variant, root / variant.name)
        print(file=sys.stderr)
        folders = [str(root / v.name) for v in variants]
        compare = Path(__file__).parent / "compare.ts"
        run = subprocess.run(["node", "--import", "tsx", str(compare), *folders], stdout=subprocess.PIPE, text=True, check=True)
        report = json.loads(run.stdout)
        failed = 0
        for variant in variants:
            problems = report[str(root / variant.name)]
            if variant.loads and not problems:
                problems = [f"saved: {p}" for p in check_saved(root / variant.name)]
            failed += bool(problems)
            for problem in problems:
                print(f"{variant.name}: {problem}")
    print(f"{len(variants)} variants, {failed} with differences")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
