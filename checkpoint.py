"""What a run leaves behind: its folder, checkpoints, and the way back from them. Nothing lost, nothing silent.

A checkpoint is a folder RUN/checkpoints/step-N, written beside the older ones, flushed, then renamed; two are kept:

    model.safetensors      the float32 masters. With config.json, tokenizer etc. beside it the folder is an ordinary model
                           folder too, for from_pretrained or --model
    optimizer.safetensors  Adam's moments and step counts     } neither after a phase's last step: the next phase
    frozen.safetensors     the frozen copy, compute type      } starts with moments and a copy of its own
    state.json             step, iteration, phase, settings, the boxes of the frozen Perceiver, accuracies so far, and all
                           random generators (the loop draws from none of them: see `draw` and the sampler's seed)
    manifest.json          size and checksum of every file above

There is no pickle anywhere: tensors are safetensors, the rest is JSON. Nothing here knows the algorithm.
"""

import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from crop import picture
from rollout import InputError


# ---------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def replacing(path):
    """Yields path.new for a file or a folder; flushes it and renames it to `path`, which so appears as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        for part in (new, *new.rglob("*"), path.parent) if os.name == "posix" else ():  # Windows cannot flush a folder
            handle = os.open(part, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)
        new.replace(path)
    except (OSError, SafetensorError):
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with replacing(path) as new:
        new.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_json(path, row):
    """Add one line. What is not finite becomes null, or other JSON readers would stumble."""
    row = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def save_sample(run, step, phase, example, boxes, perceived, reasoned, reward):
    texts = [("perceiver", perceived), ("reasoner", reasoned), ("truth", example.answer), ("reward", f"{reward:g}")]
    page = picture(example.load_image(), boxes, example.question, [(title, str(text)) for title, text in texts])
    (run / "samples").mkdir(exist_ok=True)
    page.save(run / "samples" / f"{step:05d}-{phase}.png")


WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")


def fill_model_folder(folder, weights, source):
    """An ordinary model folder: weights {name: tensor}, tied ones once, and every other file of the folder `source`."""
    for file in Path(source).rglob("*"):
        place = file.relative_to(source)
        ours = place.name in ("state.json", "manifest.json")  # of a checkpoint that became another run's --model
        if file.is_file() and not file.name.endswith(WEIGHT_FILES) and not place.parts[0].startswith(".") and not ours:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_model(policy, source, folder):
    """bf16 weights and every other file of the original folder: from_pretrained and vLLM can load it."""
    with replacing(folder) as new:
        new.mkdir()
        fill_model_folder(new, {name: p.detach().to(torch.bfloat16) for name, p in policy.named_parameters()}, source)


def save(run, source, tensors, state):
    """Write RUN/checkpoints/step-N and keep the newest two. source: the model folder whose other files come along.
    tensors: {file: {name: tensor}}, the masters as "model". state: JSON, with the step. Raises OSError, SafetensorError."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"step-{state['step']:05d}") as new:
        new.mkdir()
        fill_model_folder(new, tensors.pop("model"), source)
        for name, group in tensors.items():
            save_file(group, new / f"{name}.safetensors")
        (new / "state.json").write_text(json.dumps(state))
        # Written last: a folder is a checkpoint if every file is what the manifest says.
        manifest = {str(path.relative_to(new)): fingerprint(path) for path in new.rglob("*") if path.is_file()}
        (new / "manifest.json").write_text(json.dumps(manifest))
    keep = [path for path in sorted(folder.glob("step-*[0-9]")) if int(path.name[5:]) <= state["step"]][-2:]
    for path in set(folder.glob("step-*")) - set(keep):  # older, damaged and passed over, or half of a killed write
        shutil.rmtree(path, ignore_errors=True)


def newest(run):
    """The newest undamaged checkpoint -> (its folder, its state), or (None, {}). Warns of those it passes over."""
    for path in sorted((run / "checkpoints").glob("step-*[0-9]"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            damaged = [name for name, known in manifest.items() if fingerprint(path / name) != known]
            if not damaged:
                return path, json.loads((path / "state.json").read_text())
        except (OSError, ValueError, AttributeError) as error:
            damaged = [str(error)]
        print(f"warning: {path} is incomplete or damaged ({', '.join(damaged)}), so the one before it is taken", file=sys.stderr)
    return None, {}


def fingerprint(path):
    """[bytes, CRC-32] of a file: shows that it was cut off or damaged."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return [os.path.getsize(path), crc]


# ---------------------------------------------------------------------------------------------
# Run folders


def new_run_folder(s):
    """Make the run folder and write config.json. Raises InputError rather than mix two runs."""
    if s.out:
        run = Path(s.out)
    else:
        run = next(path for i in range(1, sys.maxsize) if not (path := Path(f"runs/{Path(s.model).name}-{i}")).exists())
    try:
        if run.exists() and (not run.is_dir() or any(path.suffix != ".new" for path in run.iterdir())):
            raise InputError(f"--out {run} already exists and is not empty: choose another folder, or go on with --resume {run}")
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", dataclasses.asdict(s) | {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
    except OSError as error:
        raise InputError(f"cannot write to the run folder {run}: {error.strerror}; choose another with --out") from error
    return run


# What --resume may change. config.json notes when; rollout_batch changes the draws, not what they are drawn from.
MAY_CHANGE = {"lr", "weight_decay", "max_grad_norm", "iterations", "rollout_batch", "partner_batch", "eval_every", "save_every", "sample_every", "images"}
FIXED = {  # why it may not change any other setting, by the setting's group
    "what": "a run is one model on one set of questions",
    "schedule": "the phases and the order of the questions follow from it",
    "algorithm": "the steps before and after would belong to two algorithms",
    "limits": "it decides what the model sees and may write, so rewards before and after would not compare"}


def settings_of(run, kind, flags):
    """The settings (dataclass `kind`) of a run, changed by those flags that --resume may change. Raises InputError."""
    try:
        config = json.loads((Path(run) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {run}: there is no config.json that can be read, so nothing to continue; start the run "
                         f"with its own command") from error
    values = {field.name: config.get(field.name, field.default) for field in dataclasses.fields(kind)} | {"out": str(run)}
    for field in dataclasses.fields(kind):
        old, new = values[field.name], flags.get(field.name, values[field.name])
        if new != old and field.name not in MAY_CHANGE:
            raise InputError(f"--{field.name.replace('_', '-')} cannot change from {old} to {new} on --resume: "
                             f"{FIXED[field.metadata['group']]}; start a new run")
    return kind(**values | flags)


def data_key(examples):
    """A number that changes with the questions, their answers or their order."""
    return zlib.crc32(repr([(e.id, e.question, e.answer) for e in examples]).encode())


def go_on(run, s, examples):
    """Cut the log back to the newest undamaged checkpoint -> (its folder, its state), or (None, {}) to start over.
    Changed settings are noted in config.json. Raises InputError if the questions are no longer those of the start."""
    last, state = newest(run)
    step, log = state.get("step", 0), run / "metrics.jsonl"
    if last and state["data"] != data_key(examples):
        raise InputError(f"--data {s.data} no longer holds the questions that {run} began with: put them back, or start a new run")
    config, new = json.loads((run / "config.json").read_text()), dataclasses.asdict(s)
    changed = {name: [config.get(name), value] for name, value in new.items() if config.get(name) != value}
    try:
        write_json(run / "config.json", config | new | {"resumed": [*config.get("resumed", []), {"step": step, "changed": changed}]})
        write_text(log, "".join(log.read_text().splitlines(keepends=True)[:step]) if log.exists() else "")  # one line a step
    except OSError as error:
        raise InputError(f"cannot write to {run}: {error.strerror}; it is as it was") from error
    if last:
        set_random_state(state["random"])
    print(f"resuming {run} after step {step}" if last else f"{run} has no checkpoint yet: starting over")
    return last, state


def finish(run, step):
    """Note in config.json that the run has written its final/ after this step."""
    write_json(run / "config.json", json.loads((run / "config.json").read_text()) | {"finished": step})


def finished(run):
    """The step after which the run was finished, or None."""
    return json.loads((Path(run) / "config.json").read_text()).get("finished")


def random_state():
    """Python's generator, torch's, and one of each GPU, as JSON."""
    return [random.getstate(), torch.get_rng_state().tolist(), [state.tolist() for state in torch.cuda.get_rng_state_all()]]


def set_random_state(state):
    (version, words, gauss), cpu, cuda = state
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(torch.ByteTensor(cpu))
    for device, values in enumerate(cuda[:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.ByteTensor(values), device)


def disk_use(run, policy):
    """One sentence on what checkpoints will take."""
    size = sum(p.numel() * (12 + p.element_size()) for p in policy.parameters()) / 2**30  # masters, two moments, frozen copy
    return (f"checkpoints: up to {size:.2g} GiB each, the newest two are kept (a third while it is written); "
            f"{shutil.disk_usage(run).free / 2**30:.1f} GiB are free")


@contextlib.contextmanager
def kept(run, save):
    """A loop that nothing ends unsaved. Yields a list that the first Ctrl-C or SIGTERM (a second one acts at once) puts its
    number into: the loop then saves and exits. An InputError saves too. Either way the user is told how to continue."""
    def ask(number, frame):
        asked.append(number)
        signal.signal(number, before[number])
        os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")

    asked, how = [], f"continue with: python p2r_min.py --resume {shlex.quote(str(run))}"
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            yield asked
        except InputError as error:
            save()
            raise InputError(f"{error}; saved, {how}") from error
        except SystemExit:
            print(f"stopped and saved; {how}")
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {run}: {reason}; what was there is whole, so mend this and {how}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
