"""The models of oracle.py: every family in the configurations that its checkpoints come in."""
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection,
    Dinov2Config, Dinov2ForImageClassification, Dinov2Model,
    Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, Dinov2WithRegistersModel,
    DINOv3ViTConfig, DINOv3ViTModel,
    InternVLVisionConfig, InternVLVisionModel,
    SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "dogs.jpg"

Edit = Callable[[Path], None]


@dataclass
class Variant:
    name: str
    model: Callable[[], torch.nn.Module]
    sizes: list[tuple[int, int]]
    """Whether the model interpolates its positions only when asked to."""
    interpolate: bool = False
    vision: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model
    """The layer that projects the pooled output, in a model that has one."""
    projection: Callable[[torch.nn.Module], torch.nn.Module | None] = lambda model: getattr(model, "visual_projection", None)
    processor: Callable[[], object] | None = None
    edits: list[Edit] = field(default_factory=list)
    """Whether transformers has the class of what is saved."""
    loads: bool = True

    def finish(self, folder: Path) -> None:
        for edit in self.edits:
            edit(folder)


SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
MLP = {"intermediate_size": 96}
P14 = [(56, 56), (42, 70), (28, 28), (61, 45)]
P16 = [(64, 64), (48, 80), (32, 32), (70, 50)]

# ----- edits of the files -----------------------------------------------------------------------------------------


def json_file(name: str, change: Callable[[dict], dict]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()) if path.exists() else {})))
    return edit


def config(change: Callable[[dict], dict]) -> Edit:
    return json_file("config.json", change)


def tensors(name: Callable[[str], str]) -> Edit:
    def edit(folder: Path) -> None:
        path = str(folder / "model.safetensors")
        save_file({name(key): value for key, value in load_file(path).items()}, path, {"format": "pt"})
    return edit


def nested(folder: Path) -> None:
    """As transformers 5 saves a processor with a tokenizer."""
    path = folder / "preprocessor_config.json"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text()), "processor_class": "X"}))
    path.unlink()


def with_nulls(json: dict) -> dict:
    names = "crop_size data_format device disable_grouping do_center_crop do_convert_rgb do_pad input_data_format pad_size return_tensors"
    return {**{name: None for name in names.split()}, **json}


"""What transformers 4 wrote for every part of a model."""
DUMP = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "begin_suppress_tokens": None,
    "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torch_dtype": "float32", "torchscript": False, "transformers_version": "4.37.2", "typical_p": 1.0, "use_bfloat16": False,
}


def dumped(json: dict) -> dict:
    return {**DUMP, **json}


def dumped_tower(json: dict) -> dict:
    return {**json, "vision_config": dumped(json["vision_config"])}


PREFIXES = {"ddp": "module.", "compiled": "_orig_mod.", "wrapped": "model."}

# ----- families ---------------------------------------------------------------------------------------------------


def plain(name: str, model: type, config_class: type, base: dict, sizes: list, variants: dict[str, dict], **more) -> Iterator[Variant]:
    """The class alone: one variant for each set of fields, and one each for what may be around any of them."""
    def make(fields: dict) -> Callable[[], torch.nn.Module]:
        return lambda: model(config_class(**{**base, **fields}))
    for label, fields in variants.items():
        own = [(size, size) for size in [fields.get("image_size")] if isinstance(size, int)]
        yield Variant(f"{name}-{label}", make(fields), own + sizes, **more)
    yield Variant(f"{name}-dump", make({}), sizes[:2], edits=[config(dumped)], **more)
    for label, prefix in PREFIXES.items():
        yield Variant(f"{name}-{label}", make({}), sizes[:1], edits=[tensors(lambda key, p=prefix: p + key)], **more)


def clip() -> Iterator[Variant]:
    base = {**SHAPE, **MLP, "image_size": 64, "patch_size": 16}
    options = {"interpolate": True}
    yield from plain("clip", CLIPVisionModel, CLIPVisionConfig, base, P16, {
        "base": {}, "gelu": {"hidden_act": "gelu"}, "gelu-new": {"hidden_act": "gelu_new"}, "eps": {"layer_norm_eps": 1e-3},
        "heads": {"num_attention_heads": 6}, "patch14": {"patch_size": 14, "image_size": 60}, "patch32": {"patch_size": 32, "image_size": 70},
    }, **options)
    projected = CLIPVisionConfig(**base, projection_dim=24)
    yield Variant("clip-projection", lambda: CLIPVisionModelWithProjection(projected), P16, **options, vision=lambda model: model.vision_model)
    whole = CLIPConfig(text_config={**SHAPE, **MLP, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}, vision_config=base, projection_dim=24)
    tower = {**options, "vision": lambda model: model.vision_model}
    yield Variant("clip-tower", lambda: CLIPModel(whole), P16, **tower)
    yield Variant("clip-tower-dump", lambda: CLIPModel(whole), P16[:2], edits=[config(dumped_tower)], **tower)
    yield Variant("clip-tower-dict", lambda: CLIPModel(whole), P16[:2], **tower,
                  edits=[config(lambda c: {**c, "vision_config_dict": c["vision_config"], "vision_config": {**c["vision_config"], "num_hidden_layers": 9}})])


def siglip() -> Iterator[Variant]:
    base = {**SHAPE, **MLP, "image_size": 64, "patch_size": 16}
    options = {"interpolate": True}
    yield from plain("siglip", SiglipVisionModel, SiglipVisionConfig, base, P16, {
        "base": {}, "so400m": {"patch_size": 14, "image_size": 60}, "no-head": {"vision_use_head": False}, "gelu": {"hidden_act": "gelu"},
        "eps": {"layer_norm_eps": 1e-3},
    }, **options)
    whole = SiglipConfig(text_config={**SHAPE, **MLP, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}, vision_config=base)
    tower = {**options, "vision": lambda model: model.vision_model}
    yield Variant("siglip-tower", lambda: SiglipModel(whole), P16, **tower)
    yield Variant("siglip-tower-dump", lambda: SiglipModel(whole), P16[:2], edits=[config(dumped_tower)], **tower)


def dinov2() -> Iterator[Variant]:
    base = {**SHAPE, "image_size": 56, "patch_size": 14}
    variants = {
        "base": {}, "swiglu": {"use_swiglu_ffn": True}, "no-qkv-bias": {"qkv_bias": False}, "mlp2": {"mlp_ratio": 2}, "relaxed": {"layer_norm_eps": 1e-3},
        "gelu-new": {"hidden_act": "gelu_new"}, "cut": {"image_size": 60}, "patch16": {"patch_size": 16, "image_size": 64},
    }
    yield from plain("dinov2", Dinov2Model, Dinov2Config, base, P14, {**variants, "no-mask-token": {"use_mask_token": False}})
    yield from plain("dinov2reg", Dinov2WithRegistersModel, Dinov2WithRegistersConfig, base, P14, {
        **variants, "one": {"num_register_tokens": 1}, "none": {"num_register_tokens": 0},
    })
    yield Variant("dinov2-classifier", lambda: Dinov2ForImageClassification(Dinov2Config(**base, num_labels=5)), P14, vision=lambda m: m.dinov2)
    yield Variant("dinov2reg-classifier", lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**base, num_labels=5)), P14,
                  vision=lambda m: m.dinov2_with_registers)


def dinov3() -> Iterator[Variant]:
    base = {**SHAPE, **MLP, "image_size": 64, "patch_size": 16, "num_register_tokens": 4}
    off = {name: False for name in ("query_bias", "value_bias", "proj_bias", "mlp_bias")}
    yield from plain("dinov3", DINOv3ViTModel, DINOv3ViTConfig, base, P16, {
        "base": {}, "no-registers": {"num_register_tokens": 0}, "gated": {"use_gated_mlp": True, "hidden_act": "silu"}, "key-bias": {"key_bias": True},
        "no-bias": off, "gated-no-bias": {**off, "use_gated_mlp": True, "hidden_act": "silu"}, "theta": {"rope_theta": 31.0}, "eps": {"layer_norm_eps": 1e-3},
        "no-rescale": {"pos_embed_rescale": None}, "heads": {"num_attention_heads": 6}, "cut": {"image_size": 70},
        "patch14": {"patch_size": 14, "image_size": 56},
    })


def internvl() -> Iterator[Variant]:
    base = {**SHAPE, **MLP, "image_size": [56, 56], "patch_size": [14, 14]}
    six = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
    variants = {
        "base": {}, "bias": {"attention_bias": True}, "rms": {"norm_type": "rms_norm"}, "qk-norm": {"use_qk_norm": True}, "6b": six,
        "6b-eps": {**six, "layer_norm_eps": 1e-3}, "no-mean": {"use_mean_pooling": False}, "no-mean-rms": {**six, "use_mean_pooling": False},
        "mask-token": {"use_mask_token": True}, "scale": {"layer_scale_init_value": 1.0},
    }
    sizes = P14[:3]  # its positions are only interpolated to multiples of the patch
    yield from plain("internvl", InternVLVisionModel, InternVLVisionConfig, base, sizes, variants)
    for label in ("bias", "6b", "rms"):
        yield Variant(f"internvit-{label}", lambda fields=variants[label]: InternVLVisionModel(InternVLVisionConfig(**base, **fields)), sizes,
                      edits=[as_internvit], loads=False)


MOE = {
    "capacity_factor": 1.2, "eval_capacity_factor": 1.4, "laux_allreduce": "all_nodes", "moe_coeff_ratio": 0.5, "moe_intermediate_size": 768,
    "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before", "num_experts": 8, "num_routed_experts": 4, "num_shared_experts": 4,
    "shared_expert_intermediate_size": 3072, "use_moe": False, "use_residual": True, "use_rts": False, "use_weighted_residual": False,
}


def as_internvit(folder: Path) -> None:
    """InternVL's own layout inside a chat model, as its repositories have it."""
    def of(c: dict) -> dict:
        names = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
        kept = [*SHAPE, *MLP, "norm_type", "layer_norm_eps", "hidden_act", *names]
        vision = {names.get(name, name): c[name] for name in kept}
        sizes = {"image_size": c["image_size"][0], "patch_size": c["patch_size"][0]}
        return {"model_type": "internvl_chat", "vision_config": dumped({"model_type": "intern_vit_6b", **vision, **sizes, **MOE})}
    config(of)(folder)
    old = load_file(folder / "model.safetensors")
    new = {"mlp1.0.weight": torch.ones(4)}
    for key, value in old.items():
        if "k_proj" in key or "v_proj" in key:
            continue
        name = key.replace("encoder.layer.", "encoder.layers.")
        for a, b in (("cls_token", "class_embedding"), ("patch_embeddings.projection", "patch_embedding"), ("position_embeddings", "position_embedding"),
                     ("attention.projection_layer", "attn.proj"), ("attention.q_proj", "attn.qkv"), ("attention.", "attn."), ("layernorm_before", "norm1"),
                     ("layernorm_after", "norm2"), ("lambda_", "ls")):
            name = name.replace(a, b)
        if "q_proj" in key:
            value = torch.cat([value, old[key.replace("q_proj", "k_proj")], old[key.replace("q_proj", "v_proj")]])
        new[f"vision_model.{name}"] = value.contiguous()
    save_file(new, str(folder / "model.safetensors"))


def processors() -> Iterator[Variant]:
    """The photograph, as each family's processor prepares it."""
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    crops = {
        "crop": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        "edge": {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
        "wide": {"size": {"shortest_edge": 80}, "crop_size": {"height": 48, "width": 80}},
        "odd": {"size": {"shortest_edge": 71}, "crop_size": {"height": 61, "width": 67}},
        "bilinear": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 2},
        "lanczos": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 1},
        "box": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 4},
        "statistics": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, **stats},
        "unnormalised": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "do_normalize": False},
    }
    squares = {
        "square": {"size": {"height": 64, "width": 64}}, "tall": {"size": {"height": 96, "width": 48}}, "odd": {"size": {"height": 61, "width": 67}},
        "bilinear": {"size": {"height": 64, "width": 64}, "resample": 2}, "statistics": {"size": {"height": 64, "width": 64}, **stats},
    }
    p16 = {**SHAPE, **MLP, "image_size": 64, "patch_size": 16}
    families = {
        "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**p16)), True, CLIPImageProcessorPil, crops),
        "dinov2": (lambda: Dinov2Model(Dinov2Config(**SHAPE, image_size=84, patch_size=14)), False, BitImageProcessorPil, crops),
        "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**p16)), True, SiglipImageProcessorPil, squares),
        "internvl": (lambda: InternVLVisionModel(InternVLVisionConfig(**SHAPE, **MLP, image_size=[56, 56])), False, GotOcr2ImageProcessorPil,
                     {"square": {"size": {"height": 56, "width": 56}}, "tall": {"size": {"height": 98, "width": 42}}, "statistics": {"size": {"height": 56, "width": 56}, **stats}}),
    }
    around = {"": [], "-nulls": [json_file("preprocessor_config.json", with_nulls)], "-v5": [nested]}
    for family, (model, interpolate, processor, variants) in families.items():
        for label, fields in variants.items():
            for suffix, edits in around.items():
                yield Variant(f"processor-{family}-{label}{suffix}", model, [], interpolate, processor=lambda c=processor, f=fields: c(**f), edits=edits)


def all_variants() -> list[Variant]:
    return [v for family in (clip, siglip, dinov2, dinov3, internvl, processors) for v in family()]
