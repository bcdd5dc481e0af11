"""What TRL's GRPOTrainer makes of our tensors. A script, not a test; it needs TRL, a CPU will do.

    pip install trl==1.16.0 && python tests/trl_numbers.py      # prints what test_trl.py keeps

Rewards, masks, advantages and the loss take TRL's own way, from its settings to its metrics. Only
two things are put in its place: the sampled ids (`rollout_func`, TRL's own hook; only their number
matters) and the log-probs, which are our tensors instead of the output of its tiny random model.
Each group is a micro-batch, as in grpo.update_batch, and the gradient is that of their sum.

SETTINGS holds those of TRL's settings that make its loss ours. Two that do not: loss_type="bnpo"
divides by the tokens of a micro-batch instead of the batch's, "grpo" is a mean of means.
"""

import pprint
import tempfile

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

SEED = 4            # ratios beyond either end of the clip, none within 0.015 of it
Q, G = 3, 4
REWARDS = [1, 0, 0, 1,  1, 0, 0, 0,  1, 1, 1, 1]    # the last group agrees: its advantages are 0
LENGTHS = [2, 9, 5, 1,  7, 3, 3, 6,  1, 4, 2, 8]
GROUP_TOKENS = [17, 19, 15]                         # sums of the four LENGTHS of each group
SETTINGS = {
    "loss_type": "dapo",                # the sum over the batch's tokens, divided by their number
    "epsilon": 0.2,                     # our clip
    "scale_rewards": "group",           # divide by the group's std + 1e-4 (we by std + 1e-6)
    "use_bias_correction_kl": False,    # our KL has no importance ratio; TRL's default is True
    "temperature": 1.0,
}


def tensors():
    """logp, old_logp, ref_logp: (T,) float32 each, the tokens of all responses one after another.

    They are drawn by numpy's RandomState, because its stream is the same in every version.
    """
    # A sigma of 0.3 puts half of the ratios exp(logp - old_logp) outside 0.8 .. 1.2.
    random = np.random.RandomState(SEED)
    T = sum(LENGTHS)
    logp = -random.exponential(1.0, T)
    old_logp = logp + 0.3 * random.randn(T)
    ref_logp = logp + 0.3 * random.randn(T)
    return [torch.tensor(values, dtype=torch.float32) for values in (logp, old_logp, ref_logp)]


def tiny_model(folder):
    """A random text model and its tokenizer: the trainer wants them, but their output is unused."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    # Two words do: no text is sampled, and the reward does not read any.
    words = Tokenizer(models.WordLevel({"word": 0, "<end>": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>",
                            pad_token="<end>").save_pretrained(folder)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8,
        num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)


def trainer_and_batch(folder, beta):
    """TRL's trainer and its batch of Q x G completions: ids, masks, advantages."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def sampled(prompts, trainer):
        completions = [[0] * length for length in LENGTHS]
        return {"prompt_ids": [[0]] * len(prompts), "completion_ids": completions, "logprobs": None}

    def reward(completions, **_):
        return REWARDS

    # One step accumulates the gradient of Q micro-batches of G completions. TRL's train() would
    # shuffle the completions before it cuts them up; here a micro-batch stays one group.
    trainer = GRPOTrainer(
        model=folder, reward_funcs=reward, rollout_func=sampled,
        train_dataset=Dataset.from_list([{"prompt": "word"}]),
        args=GRPOConfig(
            output_dir=folder, beta=beta, num_generations=G, per_device_train_batch_size=G,
            gradient_accumulation_steps=Q, max_completion_length=max(LENGTHS),
            use_cpu=True, bf16=False, report_to=[], **SETTINGS))

    # TRL reads both when it divides, and train(), which is not called, would set them.
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = Q
    return trainer, trainer._generate_and_score_completions([{"prompt": "word"}] * (Q * G))


def losses(trainer, batch, ratio_one):
    """TRL's loss and metrics of each group, and the gradient of their sum by every log-prob."""
    logp, old_logp, ref_logp = tensors()
    logp.requires_grad_()

    def padded(flat):
        return pad_sequence(flat.split(LENGTHS), batch_first=True)               # (Q G, longest R)

    # Without old log-probs TRL takes the policy's own, detached: that is its on-policy path.
    batch = batch | {"ref_per_token_logps": padded(ref_logp)}
    if not ratio_one:
        batch["old_per_token_logps"] = padded(old_logp)

    # The policy's log-probs are not part of the batch: TRL asks the model for them, here us.
    trainer._metrics["train"].clear()
    loss = []
    for q in range(Q):
        group = slice(q * G, q * G + G)
        inputs = {key: value[group] if value.dim() else value for key, value in batch.items()}
        policy = padded(logp)[group]
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, policy * 0, None)
        loss.append(trainer._compute_loss(trainer.model, inputs))
    sum(loss).backward()

    # The gradient in short: its norm, and its entry at the first token of each group. TRL measures
    # no KL if its coefficient is 0.
    metrics = trainer._metrics["train"]
    return {"loss": short(loss),
            "kl": short(metrics.get("kl", [])),
            "clip_ratio": short(metrics["clip_ratio/region_mean"]),
            "grad_norm": short([logp.grad.norm()])[0],
            "grad": short([part[0] for part in logp.grad.split(GROUP_TOKENS)])}


def short(values):
    return [round(float(value), 8) for value in values]


def main():
    import transformers
    import trl

    # TRL loads a reference only for a KL coefficient above 0, so each has a trainer of its own.
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        for beta in (0.0, 0.01):
            trainer, batch = trainer_and_batch(folder, beta)
            for ratio_one in (True, False):
                case = {"beta": beta, "ratio_one": ratio_one}
                cases.append(case | losses(trainer, batch, ratio_one))

    versions = {lib.__name__: lib.__version__ for lib in (trl, torch, transformers)}
    numbers = {"versions": versions, "advantages": short(batch["advantages"]), "cases": cases}
    pprint.pp(numbers, width=100, compact=True)


if __name__ == "__main__":
    main()
