"""Seconds until the first and the second question about a scan are answered, and the second asked the plain way.

    python benchmarks/second_question.py [--rounds 7] [--model outputs/quickstart/stage3] \
        [--scan outputs/quickstart/demo_ct/chest_ct.nii.gz]

In every round, in this order:
- first: the file is read, the scan encoded, the question answered (`EncodedScan.read` and `ask`);
- second: another question about the same scan (`ask`);
- plain: the same other question through `processor(...)` and `generate`, which know nothing of the first.
Once with questions that have a short answer, and once with two reports. The second and the plain answer have to be the
same words. Loading the model is not counted; a round before the measured ones warms everything up.
"""

import argparse
import platform
import statistics
import time

import torch

from hsenet.encoded_scan import EncodedScan, load_generation_model


PAIRS = {
    "questions": ("Is there a pleural effusion?", "Is there a pulmonary nodule?"),
    "reports": ("Can you summarize with findings the images presented?", "Write the report of this CT scan."),
}


def plain(model, processor, path: str, question: str, max_new_tokens: int) -> str:
    inputs = processor(volumes=[path], text=[question], return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def measure(model, processor, path: str, pair: tuple[str, str], max_new_tokens: int) -> tuple[dict[str, float], int]:
    """Seconds of each side, and the letters of the second answer."""
    times = [time.perf_counter()]
    scan = EncodedScan.read(model, processor, path)
    scan.ask(pair[0], max_new_tokens=max_new_tokens, do_sample=False)
    times.append(time.perf_counter())
    second = scan.ask(pair[1], max_new_tokens=max_new_tokens, do_sample=False)
    times.append(time.perf_counter())
    other = plain(model, processor, path, pair[1], max_new_tokens)
    times.append(time.perf_counter())
    if second != other:
        raise SystemExit(f"The two ways gave different answers: {second!r} and {other!r}.")
    seconds = [end - begin for begin, end in zip(times, times[1:], strict=False)]
    return dict(zip(("first", "second", "plain"), seconds, strict=True)), len(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="outputs/quickstart/stage3")
    parser.add_argument("--scan", default="outputs/quickstart/demo_ct/chest_ct.nii.gz")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model, processor = load_generation_model(arguments.model, device=arguments.device)
    processor_name = platform.processor() or platform.machine()
    print(f"{processor_name}, {torch.get_num_threads()} thread(s), {arguments.device}, {model.dtype}")
    print(f"{'':10}{'first s':>9}{'second s':>9}{'plain s':>9}{'first/second':>18}{'plain/second':>18}{'letters':>9}")
    for name, pair in PAIRS.items():
        settings = (model, processor, arguments.scan, pair, arguments.max_new_tokens)
        measure(*settings)
        rounds = []
        for _ in range(arguments.rounds):
            seconds, letters = measure(*settings)
            rounds.append(seconds)
        medians = [statistics.median(one[side] for one in rounds) for side in ("first", "second", "plain")]
        line = f"{name:10}" + "".join(f"{median:9.3f}" for median in medians)
        for side in ("first", "plain"):
            ratios = sorted(one[side] / one["second"] for one in rounds)
            line += f"{f'{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})':>18}"
        print(f"{line}{letters:9}")


if __name__ == "__main__":
    main()
