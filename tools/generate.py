"""Ask a trained HealthGPT one question, or have it draw.

    python tools/generate.py --checkpoint runs/demo/stage3 --image ct.png --question "What is the modality?"
    python tools/generate.py --checkpoint runs/demo/stage3 --image ct.png --question "Reconstruct it." --draw out.png

The `<image>` placeholders are put in front of the question, one per --image, unless it has them already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument("--question", required=True)
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw a picture into this file instead of answering")
    parser.add_argument("--free", action="store_true", help="draw without forcing the right number of image tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the stored configuration")
    arguments = parser.parse_intermixed_args()

    from megatron_hgpt import distributed
    from megatron_hgpt.errors import HealthGPTError
    from megatron_hgpt.inference.loading import load_run
    from megatron_hgpt.samples import Task

    try:
        run = load_run(arguments.checkpoint, overrides=arguments.overrides)
        from megatron_hgpt.inference.generator import Prompt, Sampling

        question = arguments.question
        if "<image>" not in question:
            question = "<image>\n" * len(arguments.image) + question
        task = Task.GENERATION if arguments.draw else Task.COMPREHENSION
        prompt = Prompt(task=task, question=question, images=list(arguments.image))
        sampling = Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
        )
        if arguments.draw:
            (image,) = run.generator.draw_images(
                [prompt], run.require_vqgan(), sampling=sampling, constrained=not arguments.free
            )
            arguments.draw.parent.mkdir(parents=True, exist_ok=True)
            image.save(arguments.draw)
            print(arguments.draw)
        else:
            print(run.generator.answer([prompt], max_new_tokens=arguments.max_new_tokens, sampling=sampling)[0])
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
