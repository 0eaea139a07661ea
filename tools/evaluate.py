"""Evaluate a trained run on a JSON file: answers scored by exact match, pictures by SSIM, PSNR and MSE.

    torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint runs/demo/stage3 \
        --data held-out=runs/demo/assets/vl_health_mini/test.json --output runs/demo/evaluation

Processes beyond --tensor-parallel share the samples. The output folder holds results.json and the pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument(
        "--data", action="append", required=True, metavar="[SPLIT=]FILE", help="test file; repeat for several splits"
    )
    parser.add_argument("--image-root", type=Path, help="folder of the images; default: the test file's")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="training file; its most frequent answers are scored beside the model",
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder per split is written below it")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--max-vqa", type=int, help="questions per split at most")
    parser.add_argument("--max-images", type=int, help="pictures per split at most")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the stored configuration")
    arguments = parser.parse_intermixed_args()

    from megatron_hgpt import distributed
    from megatron_hgpt.errors import HealthGPTError
    from megatron_hgpt.evaluation.runner import evaluate, majority_baseline
    from megatron_hgpt.evaluation.store import save_results
    from megatron_hgpt.inference.loading import load_run

    try:
        run = load_run(arguments.checkpoint, tensor_parallel=arguments.tensor_parallel, overrides=arguments.overrides)
        root: Path | None = arguments.image_root
        train: Path | None = arguments.baseline
        baseline = majority_baseline(train, root or train.parent) if train else None
        for item in arguments.data:
            name, separator, path = item.rpartition("=")
            file = Path(path)
            split = name if separator else file.stem
            results = evaluate(
                run,
                file,
                root or file.parent,
                max_vqa=arguments.max_vqa,
                max_images=arguments.max_images,
                max_new_tokens=arguments.max_new_tokens,
                baseline=baseline,
            )
            if results is not None:
                summary = save_results(arguments.output / split, vqa=results[0], images=results[1], split=split)
                print(json.dumps({split: summary}, indent=1), flush=True)
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
