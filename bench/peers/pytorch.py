#!/usr/bin/env python3
"""Times the same model in PyTorch on the same GPU or CPU: the peer of `npm run bench`, and on a GPU of `uniflow_gpu_check`.

Random weights. With --dtype bfloat16, inference is bfloat16 throughout, and training has float32 weights under bfloat16
autocast, as PyTorch's own recipes have it. Attention is scaled_dot_product_attention. Each row is timed as it is (eager)
and through torch.compile, where PyTorch is 2.0 or newer. Pictures and latents are on the device before the clock starts,
and results stay there.

On a CPU, whose PyTorch comes without MKL (Debian's python3-torch), float32 is as fast as the BLAS that is installed:
apt install libopenblas0-openmp.
"""
import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:  # --help works without it
    torch = nn = None

PATCH = 14
PIXELS = 3 * PATCH * PATCH
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER_HEADS = 16
# as lib/config.ts: width, layers and heads of the encoder, its picture, latent channels, global and flow blocks of the decoder
PRESETS = {
    "tiny": dict(width=192, layers=6, heads=3, size=224, latents=32, global_blocks=2, flow_blocks=4),
    "base": dict(width=768, layers=12, heads=12, size=224, latents=64, global_blocks=6, flow_blocks=12),
    "official": dict(width=1024, layers=24, heads=16, size=448, latents=64, global_blocks=6, flow_blocks=12),
}

# --- the model: B images, N patches, D width, P pixels of a patch ---------------------------------------------------------

Module = nn.Module if nn else object


def attention(q, k, v):
    """[B,H,S,E] each."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v  # before PyTorch 2.0


class Block(Module):
    """Pre-norm transformer block, with LayerScale where asked for."""

    def __init__(self, width, heads, eps, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ls1 = nn.Parameter(torch.full((width,), 0.1)) if layer_scale else None
        self.ls2 = nn.Parameter(torch.full((width,), 0.1)) if layer_scale else None

    def forward(self, h):
        b, s, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = self.proj(attention(q, k, v).transpose(1, 2).reshape(b, s, d))
        h = h + (a if self.ls1 is None else a * self.ls1)
        m = self.fc2(F.gelu(self.fc1(self.norm2(h))))
        return h + (m if self.ls2 is None else m * self.ls2)


class Mlp(Module):
    def __init__(self, inner, outer, activation, width=None):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(inner, width or outer), nn.Linear(width or outer, outer), activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


def normalised(pictures, dtype):
    """uint8 [B,H,W,3] -> [B,3,H,W]."""
    mean, std = (torch.tensor(v, device=pictures.device) for v in (MEAN, STD))
    return ((pictures / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)


def patchify(images):
    """[B,3,H,W] -> [B,N,P], channel slowest inside a patch."""
    b, c, h, w = images.shape
    return images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, PIXELS)


class Encoder(Module):
    def __init__(self, width, layers, heads, latents, size, **_):
        super().__init__()
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, 1e-6, True) for _ in range(layers))
        self.project = Mlp(width, latents, F.gelu, width)

    def states(self, images):
        """[B,3,H,W] -> every layer's [B,1+N,D]."""
        h = self.patch(images).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1).to(h.dtype), h], 1) + self.positions
        states = []
        for block in self.blocks:
            h = block(h)
            states.append(h)
        return states

    def forward(self, pictures):
        return self.project(self.states(normalised(pictures, self.token.dtype))[-1][:, 1:])


class FlowBlock(Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp, self.modulation = nn.LayerNorm(width, 1e-6), Mlp(width, width, F.silu), nn.Linear(width, 3 * width)

    def forward(self, h, y):
        shift, scale, gate = self.modulation(y).chunk(3, -1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class Decoder(Module):
    def __init__(self, width, latents, size, global_blocks, flow_blocks, **_):
        super().__init__()
        patches = (size // PATCH) ** 2
        self.unproject = Mlp(latents, width, F.gelu)
        self.positions = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, patches, width)) for _ in range(2))
        self.global_blocks = nn.ModuleList(Block(width, DECODER_HEADS, 1e-5, False) for _ in range(global_blocks))
        self.time, self.embed, self.input = Mlp(256, width, F.silu), nn.Linear(width, width), nn.Linear(PIXELS, width)
        self.flow_blocks = nn.ModuleList(FlowBlock(width) for _ in range(flow_blocks))
        self.modulation, self.output = nn.Linear(width, 2 * width), nn.Linear(width, PIXELS)

    def condition(self, z):
        """Latents [B,N,Z] -> [B,N,D]."""
        h = self.unproject(z) + self.positions[0]
        for block in self.global_blocks:
            h = block(h)
        return h + self.positions[1]

    def velocity(self, x, t, c):
        """x [M,P] at the times t, [M] or [1] for all, under c [M,D]."""
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=x.device))
        angles = 1000 * t[:, None] * frequencies
        y = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1).to(c.dtype)) + self.embed(c))
        h = self.input(x.to(c.dtype))
        for block in self.flow_blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, -1)
        return self.output(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    def integrate(self, c, steps=1):
        """Condition [B,N,D] -> uint8 [B,H,W,3], from noise that is drawn here."""
        b, n, d = c.shape
        c, x = c.reshape(b * n, d), torch.randn(b * n, PIXELS, device=c.device)
        for k in range(steps):
            x = x + self.velocity(x, torch.full((1,), k / steps, device=c.device), c) / steps
        side = math.isqrt(n)
        images = x.view(b, side, side, 3, PATCH, PATCH).permute(0, 1, 4, 2, 5, 3).reshape(b, side * PATCH, side * PATCH, 3)
        mean, std = (torch.tensor(v, device=c.device) for v in (MEAN, STD))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def forward(self, z):
        return self.integrate(self.condition(z))


def distillation(student, teacher, beta=2.0):
    """Layer-wise adaptive distillation over [B,S,D], the class token left out."""
    alpha = torch.stack([(1 - F.cosine_similarity(s[:, 1:].float(), t[:, 1:].float(), dim=-1)).mean() for s, t in zip(student, teacher)])
    weight = torch.arange(1, len(alpha) + 1, device=alpha.device) * torch.exp(beta * alpha.detach())
    return (weight / weight.sum() * alpha).sum()


def training_loss(encoder, decoder, teacher, pictures):
    images = normalised(pictures, torch.float32)
    with torch.no_grad():
        wanted = teacher.states(images)
    states = encoder.states(images)
    c = decoder.condition(encoder.project(states[-1][:, 1:]))
    data = patchify(images).reshape(-1, PIXELS)
    noise, t = torch.randn_like(data), torch.rand(len(data), device=data.device)
    v = decoder.velocity(t[:, None] * data + (1 - t[:, None]) * noise, t, c.flatten(0, 1))
    return F.mse_loss(v.float(), data - noise) + distillation(states, wanted)


# --- the rows: each a function that makes the work of one call, given what compiles a function ------------------------------


def random_pictures(batch, size, device):
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)


def encode(preset, batch, dtype, device, compiled):
    model = Encoder(**preset).to(device, dtype)
    work, pictures = compiled(model), random_pictures(batch, preset["size"], device)
    return no_grad(lambda: work(pictures))


def decode(preset, batch, dtype, device, compiled):
    model = Decoder(**preset).to(device, dtype)
    z = torch.randn(batch, (preset["size"] // PATCH) ** 2, preset["latents"], dtype=dtype, device=device)
    work = compiled(model)
    return no_grad(lambda: work(z))


def flow(preset, batch, dtype, device, compiled):
    model = Decoder(**{**preset, "global_blocks": 0}).to(device, dtype)
    c = torch.randn(batch, (preset["size"] // PATCH) ** 2, preset["width"], dtype=dtype, device=device)
    work = compiled(model.integrate)
    return no_grad(lambda: work(c))


def distil(layers, shape, dtype, device, compiled):
    def stack(wants_grad):
        return [torch.randn(shape, dtype=dtype, device=device, requires_grad=wants_grad) for _ in range(layers)]

    student, teacher, loss = stack(True), stack(False), compiled(distillation)
    return lambda: torch.autograd.grad(loss(student, teacher), student)


def encoder_shapes(width, layers):
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,), (width, 4 * width)]
    return [(width, PIXELS), (width,)] + layers * (block + 5 * [(width,)])


def adamw(shapes, device, **how):
    """Float32 only: ours also writes a bfloat16 copy of every weight, in the same pass."""
    parameters = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **how).step


ADAMW = {"cuda": ("fused", "foreach"), "cpu": ("foreach",)}  # the fastest first


def train(preset, batch, dtype, device, compiled):
    encoder, decoder, teacher = (make(**preset).to(device) for make in (Encoder, Decoder, Encoder))
    teacher.requires_grad_(False)
    pictures, loss = random_pictures(batch, preset["size"], device), compiled(training_loss)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **{ADAMW[device][0]: True})

    def step():
        with torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            value = loss(encoder, decoder, teacher, pictures)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def no_grad(work):
    def quiet():
        with torch.no_grad():
            return work()

    return quiet


VARIANTS = {"eager": lambda f: f}
if hasattr(torch, "compile"):
    VARIANTS |= {"compile": lambda f: torch.compile(f), "max-autotune": lambda f: torch.compile(f, mode="max-autotune")}


def rows(options):
    """(family, name, shape, dtype, {variant: makes the work}), under the names of bench/*.ts; native/test/gpu has others: ALIASES."""
    preset = {**PRESETS[options.model], "size": options.size}
    device, dtype = options.device, getattr(torch, options.dtype)
    batch, model, patches = options.batch, options.model, (options.size // PATCH) ** 2
    picture = f"{options.size}x{options.size}x3"
    trained = "tiny" if model == "tiny" else "base"
    of_trained = PRESETS[trained]
    layers, width, side = preset["layers"], preset["width"], of_trained["size"]
    shapes = encoder_shapes(of_trained["width"], of_trained["layers"])
    millions = sum(math.prod(s) for s in shapes) / 1e6

    def variants(make, *arguments):
        return {name: lambda compiled=compiled: make(*arguments, device, compiled) for name, compiled in VARIANTS.items()}

    yield "tokenizer", f"encode {model}", f"{batch}x{picture}", options.dtype, variants(encode, preset, batch, dtype)
    yield "tokenizer", f"decode {model}, 1 step", f"{batch}x{patches}x{preset['latents']}", options.dtype, variants(decode, preset, batch, dtype)
    yield "flow", "1 step", f"{batch}x{patches}x{width}", options.dtype, variants(flow, preset, batch, dtype)
    shape = (4, 1 + patches, width)
    yield "training", "distillation with gradient", "x".join(map(str, (layers, *shape))), options.dtype, variants(distil, layers, shape, dtype)
    how = {name: lambda name=name: adamw(shapes, device, **{name: True}) for name in ADAMW[device]}
    yield "training", f"AdamW of {'ViT-B' if trained == 'base' else trained}", f"{millions:.1f}M", "float32", how
    for n in options.train_batch:
        yield "training", f"step of {trained}", f"{n}x{side}x{side}x3", options.dtype, variants(train, of_trained, n, dtype)


# --- timing ---------------------------------------------------------------------------------------------------------------

SAMPLES, SAMPLES_OF_LONG, LONG_MS, WARM_UP_MS, MEASURE_MS, SAMPLE_MS = 10, 3, 2000, 300, 1000, 2


def time_calls(work, calls, device):
    """Milliseconds per call, on a GPU between two events."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        return 1000 * (time.perf_counter() - begin) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(work, device):
    for _ in range(3):  # the first calls compile
        estimate = time_calls(work, 1, device)
    for _ in range(min(200, int(WARM_UP_MS / estimate))):
        estimate = min(estimate, time_calls(work, 1, device))
    calls = max(1, math.ceil(SAMPLE_MS / estimate))
    least = SAMPLES if estimate < LONG_MS else SAMPLES_OF_LONG
    samples = [time_calls(work, calls, device) for _ in range(max(least, min(200, int(MEASURE_MS / (estimate * calls)))))]
    return {"medianMs": statistics.median(samples), "minMs": min(samples), "samples": len(samples), "callsPerSample": calls}


def measure_variant(make, device):
    """A row's figures, or why there are none: not every mode takes every function."""
    try:
        return measure(make(), device)
    except Exception as error:  # whatever the compiler raises
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]}
    finally:
        if hasattr(torch, "_dynamo"):
            torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


# --- ours -----------------------------------------------------------------------------------------------------------------


# rows of uniflow_gpu_check that are the same work under another name, as a pattern for `family name`
ALIASES = [(re.compile(r"distillation (\d+) x \[(\d+), (\d+), (\d+)\]"), r"training distillation with gradient \1x\2x\3x\4")]


def key(family, name, shape, dtype):
    text = f"{family} {name} {shape}".strip()
    for pattern, ours in ALIASES:
        text = pattern.sub(ours, text)
    return f"{text} {dtype}"


def read_ours(paths):
    ours = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            ours.update({key(r["family"], r["name"], r.get("shape", ""), r["dtype"]): r["medianMs"] for r in report["rows"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"pytorch.py: --ours {path}: no JSON of uniflow_gpu_check or `npm run bench`: {error}")
    return ours


def write_report(path, device, results):
    """After every row, so that a limit of time costs no more than the row that it ends."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    report = {"date": now, "device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": results}
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    os.replace(path + ".part", path)


LINE = "{:<10} {:<28} {:<20} {:<9} {:<13} {:>10}  {:>10} {:>12}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU (default: one for each that there is)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--model", choices=sorted(PRESETS), default="official",
                        help="what encodes, decodes and distils; training steps are of base, or of tiny (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures of encoding and decoding (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of these pictures, a multiple of 14 (default: the model's, 448 of official)")
    parser.add_argument("--train-batch", type=int, nargs="+", default=[8, 64], metavar="N",
                        help="pictures of a training step (default: 8 64)")
    parser.add_argument("--variants", nargs="+", choices=["eager", "compile", "max-autotune"], metavar="NAME",
                        help="only these, and all of AdamW (default: all; max-autotune takes minutes a row, and so does compiling a training step)")
    parser.add_argument("--filter", type=re.compile, metavar="REGEX", help="only rows whose 'family operation shape dtype variant' matches")
    parser.add_argument("--ours", action="append", default=[], metavar="FILE",
                        help="JSON of uniflow_gpu_check or `npm run bench`: rows with the same name, shape and type are set beside; "
                             "may be given twice")
    options = parser.parse_args()
    options.size = options.size or PRESETS[options.model]["size"]
    if options.size % PATCH or min(options.size, options.batch, *options.train_batch) < 1:
        parser.error("--size must be a positive multiple of 14, batches positive")
    if torch is None:
        sys.exit("pytorch.py: PyTorch is missing: python3 -m pip install torch (2.2 or newer)")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"pytorch.py: PyTorch {torch.__version__} finds no CUDA GPU; --device cpu times it on the processor")
    ours = read_ours(options.ours)
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
        print(f"{device}; PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        torch.set_num_threads(options.threads)
        device = f"{platform.machine()}, {options.threads} threads"
        print(f"{device}; PyTorch {torch.__version__}")
    print(LINE.format("family", "operation", "shape", "dtype", "variant", "median ms", "ours ms", "ours/theirs").rstrip())
    results = []
    for family, name, shape, dtype, variants in rows(options):
        mine = ours.get(key(family, name, shape, dtype))
        for variant, make in variants.items():
            if options.filter and not options.filter.search(f"{family} {name} {shape} {dtype} {variant}"):
                continue
            if options.variants and variant not in options.variants and variant in VARIANTS:
                continue
            result = measure_variant(make, options.device)
            results.append({"family": family, "name": name, "shape": shape, "dtype": dtype, "variant": variant, **result, "oursMs": mine})
            ms = result.get("medianMs")
            figures = [f"{ms:.4g}" if ms else "failed", f"{mine:.4g}" if mine else "", f"{mine / ms:.2f}" if mine and ms else ""]
            print(LINE.format(family, name, shape, dtype, variant, *figures).rstrip(), result.get("failed", ""), flush=True)
            if options.json:
                write_report(options.json, device, results)


if __name__ == "__main__":
    main()
