"""What a drill trains: a two-layer model of random weights on sixteen records of both tasks, written once."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image

from megatron_hgpt.data.preprocess_run import preprocess_run
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.model_folders import load_resolved

NUM_RECORDS = 16


def write_assets(folder: Path) -> Path:
    """Tokenizer, dataset and run.yaml in `folder`; returns the last. Nothing is written where it is there already."""
    run = folder / "run.yaml"
    if run.exists():
        return run
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number in range(NUM_RECORDS):
        Image.radial_gradient("L").rotate(20 * number).resize((32, 32)).save(folder / "pictures" / f"{number}.png")
        record = {"id": str(number), "image": f"pictures/{number}.png"}
        if number % 2:
            indices = [(number + i) % 16 for i in range(16)]
            turns = ["<image>\nReconstruct the image.", ""]
            record["target_indices"] = indices  # type: ignore[assignment]
        else:
            turns = ["<image>\nIs it picture " + str(number) + "?", "yes" if number % 4 else "no"]
        sides = zip(("human", "gpt"), turns, strict=True)
        lines.append(json.dumps({**record, "conversations": [{"from": who, "value": text} for who, text in sides]}))
    (folder / "records.jsonl").write_text("\n".join(lines))
    values = {
        "preset": "tiny",
        "output_dir": str(folder / "unused"),
        "model": {
            "tokenizer": str(make_tiny_tokenizer(folder / "tokenizer")),
            "max_seq_length": 128,
            "hf_config": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96},
            "vision": {
                "hf_config": {
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": 32,
                }
            },
            "vq": {"num_codes": 16, "num_indices": 16},
            "hlora": {
                # Dropout: a resume that does not continue the random numbers ends with other weights.
                "comprehension": {"lora_rank": 8, "alpha": 16.0, "dropout": 0.1},
                "generation": {"lora_rank": 8, "alpha": 16.0, "dropout": 0.1},
            },
        },
        "data": {"train": [str(folder / "data")], "num_workers": 1},
        "optimizer": {"lr": 1e-3, "adapter_lr": 1e-3},
        "training": {"stage": "stage3_joint", "precision": "fp32", "micro_batch_size": 2, "global_batch_size": 4},
        "logging": {"interval_steps": 1, "tensorboard": False},
    }  # fmt: skip
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(values))
    preprocess_run(load_resolved(draft), [folder / "records.jsonl"], folder / "data")
    draft.rename(run)
    return run
