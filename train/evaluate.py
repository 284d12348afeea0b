"""Scores trained models on the held-out split, each beside the floors that it has to beat.

    python train/evaluate.py --dataset DIR --stage1 outputs/stage1 --stage2 outputs/stage2 --model outputs/stage3 \
        --output_dir outputs/evaluation
    accelerate launch --num_processes 8 train/evaluate.py ...       # the same numbers

Any of the three models may be left out. Writes `metrics.json` (every score with its protocol and its interval by
patient), `predictions.jsonl`, `queries.safetensors`, `table.md`, `model_index.json` (for the models' cards), `ids.txt`
(the volumes scored) and figures. Batches that are done are kept in `parts/`: a run that was cut off goes on there.

The floors: chance, random and constant reports, the nearest training report, all findings claimed, age and sex alone,
majority answers; and the model's own output on another patient's and on a blank scan. Text that doesn't come from the
image stays as good there, and the verdict above the table says so.
"""

from hsenet.arguments import parse_arguments
from hsenet.scoring.program import EvaluationArguments, evaluate


if __name__ == "__main__":
    evaluate(*parse_arguments(EvaluationArguments))
