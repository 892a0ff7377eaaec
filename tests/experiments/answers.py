"""Which order answers most questions exactly, and in how many forward passes? Asks the sums and words of data/sums.

OMP_NUM_THREADS=1 python tests/experiments/answers.py --texts 1000     # 20 minutes for the model, and 15 more
"""

import numpy as np
import torch
from common import TAUS, log_ticks, main, plot, run_script, train_model

from data.lib.corpus import load_corpus, windows_at
from data.lib.machine import autocast
from model import load_checkpoint
from sample import denoise

FLAGS = "--data sums --context 48 --batch_size 64 --n_embd 128 --n_head 4 --level uniform --widen 0"
FLAGS += " --max_iters 4000 --evals 5 --keep 5"  # ten minutes of two cores of a Xeon with AMX
STEPS = (1, 2, 4, 8, 16)


def answer(model, canvas, device, **flags):
    """Fill a canvas (B, T) at temperature 0: the texts, and in how many steps something was set in each row."""
    passes = np.zeros(len(canvas))
    with autocast(device):
        for after in denoise(model, canvas, temperature=0.0, **flags):
            passes += (after != canvas).any(1).numpy()
            canvas = after
    return canvas, passes


def answers(config, device):
    *panels, save = plot("answers", 2)
    if config.quick:
        run_script(config, "data/sums/prepare.py", "--examples 400")
    path = train_model(config, "out-sums", FLAGS)
    saved = sorted(path.parent.glob("step-*.pt"))
    print("| training steps | order | steps or tau | forward passes | sums | words backwards |")
    for panel, ckpt in zip(panels, (saved[len(saved) // 2], path)):
        model, tokenizer, checkpoint = load_checkpoint(ckpt, device)
        T = model.config.context
        x0, starts = windows_at(load_corpus("sums", T)[1], np.arange(2 * config.texts)[:, None], T)  # half are sums
        x0, is_answer = torch.from_numpy(x0), torch.from_numpy(np.arange(T) >= starts)
        is_end = is_answer & torch.isin(x0, torch.tensor(model.config.end_ids))
        after_end = is_end.cumsum(1) > is_end  # what stands there doesn't count
        is_word = np.array(["Reverse" in tokenizer.decode(row) for row in x0.tolist()])
        for marker, order in zip("osD^vP", ("random", "confidence", "margin", "entropy", "left", "threshold")):
            flag, choices = ("tau", TAUS) if order == "threshold" else ("steps", STEPS)
            points = []
            for choice in choices:
                prompts = x0.masked_fill(is_answer, tokenizer.mask_id)
                texts, passes = answer(model, prompts, device, order=order, **{flag: choice})
                exact = ((texts == x0) | after_end).all(1).numpy()
                points.append((passes[~is_word].mean(), exact[~is_word].mean()))
                row = f"{points[-1][0]:.1f} | {points[-1][1]:.1%} | {exact[is_word].mean():.1%}"
                print(f"| {checkpoint['step']:,} | {order} | {choice} | {row} |", flush=True)
            panel.plot(*zip(*points), marker=marker, markersize=5, label=order)
        log_ticks(panel, STEPS, "forward passes")
        panel.set(title=f"after {checkpoint['step']:,} training steps", ylabel="sums answered exactly")
    panels[1].legend(fontsize="small", loc="lower right")
    save()


if __name__ == "__main__":
    main(answers, texts=32)
