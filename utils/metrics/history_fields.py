"""The events of a history and their fields: what a run may write, and what it means.

docs/history.md has a table made of it for each event. A field is declared here before it is
written.
"""

from utils.runtime.stopwatch import TIME_KINDS

STEPS_MEAN = "A mean over the steps since the last `step` line."
PHASE = {
    "phase": "Number of the phase, from 1.",
    "phase_name": "The phase's name.",
}
TOKENS = {"tokens": "Training tokens of the whole run so far."}
STEP = {"step": "Optimizer steps done in the phase."}
STEP_MEASURES = {
    "loss": f"Training loss. {STEPS_MEAN}",
    "load_balance_loss": "Load balance loss, before its coefficient; 0 for a dense model. "
    f"{STEPS_MEAN}",
    "z_loss": f"Router z-loss, before its coefficient; 0 for a dense model. {STEPS_MEAN}",
    "grad_norm": "The norm by which gradients are clipped, before it (`grad_clip` says how it "
    f"counts copies). {STEPS_MEAN}",
    "tokens_per_s": "Training tokens a second since the last `step` line, without evaluations, "
    "plots, trackers and resume points.",
    "peak_memory_gb": "Most memory allocated on the GPU since the phase began. Missing on a CPU.",
}
VALID_LOSSES = {
    "valid_loss": "Validation loss in the precision of the training step, on the same "
    "`eval_tokens` tokens every time, so that all lines can be compared.",
    "final_valid_loss": "Validation loss at the end of a phase, on the `final_eval_tokens` tokens: "
    "the better estimate of how good the model is. Missing elsewhere.",
}
BITS_PER_BYTE = {
    "bits_per_byte": "`valid_loss` in bits per byte of the evaluated text in UTF-8: the loss over "
    "ln 2, times the tokens that are predicted, over the bytes that these stand for. The end of a "
    "text is predicted too, but stands for no byte. For runs with different vocabularies.",
    "final_bits_per_byte": "`final_valid_loss` in bits per byte. Missing elsewhere.",
}

EVENT_TIMES = {
    "run": "At the start. It holds all that it takes to run this again.",
    "step": "Every `log_every` steps, and at the end of a phase.",
    "eval": "Every `eval_every` steps, at the start and the end of a phase, and 10, 50 and 200 "
    "steps after a growth.",
    "grow": "At each growth, also if it stops the run.",
    "checkpoint": "When a checkpoint is handed over to be written, which may take some seconds "
    "more. That of a trained model also has the values of the phase's last `step` and `eval` "
    "lines.",
    "change": "For each setting that is another one when the run is resumed.",
    "end": "When the run has ended. What its time was spent on adds up to `wall_s`.",
}
"""When each event is written."""

ALWAYS = {
    "event": "Name of the event, the first field of every line.",
    "wall_s": "Seconds since the command began, imports included. A resumed run goes on counting "
    "where it stopped.",
}
"""Fields of every event."""

HISTORY_FIELDS: dict[str, dict[str, str]] = {
    "run": {
        "config": "Every setting, as it was at the start. The only field that holds other objects.",
        "seed": "The run's seed.",
        "started_unix_s": "When the run began, in seconds since 1970 (UTC).",
        "corpus": "Name of the text.",
        "fallback": "Whether `auto` had to take the built-in stories.",
        "tokenizer": "The tokenizer: `data.tokenizer`, or what `auto` came to be.",
        "tokenizer_fallback": "Whether `auto` had to learn a vocabulary.",
        "fingerprint": "Fingerprint of the tokens.",
        "init_fingerprint": "Fingerprint of the pretrained model that the run began as; null for "
        "none.",
        "train_sources": "Files or splits that are trained on.",
        "valid_sources": "Files or splits that are validated on; an empty list means a part of the "
        "training text.",
        "left_out": "Files or splits that are not read, and why.",
        "null_rows": "Number of rows without a text.",
        "is_cut": "Whether there was more text than `data.num_stories`.",
        "train_documents": "Number of documents that are trained on.",
        "valid_documents": "Number of documents of the validation text.",
        "train_tokens": "Tokens of the training text.",
        "valid_tokens": "Number of the validation text's tokens.",
        "eval_tokens": "Tokens that each evaluation takes.",
        "eval_bytes": "Bytes of text, in UTF-8, that these stand for.",
        "eval_documents": "Number of the documents that these are from.",
        "final_eval_tokens": "Tokens that the evaluation at the end of a phase takes.",
        "final_eval_bytes": "Bytes of text, in UTF-8, that these stand for.",
        "final_eval_documents": "Number of the documents that these are from.",
        "device": "Name of the device.",
        "dtype": "Precision of the training step.",
        "phases": "Names of the phases, in order.",
        "params": "Parameters of each phase's model.",
        "active_params": "Parameters that a token passes through, for each phase.",
        "flops_per_token": "Floating-point operations of training on one token, for each phase.",
        "python": "Version of Python.",
        "torch": "Version of PyTorch.",
        "numpy": "Version of NumPy.",
        "tokenizers": "Version of tokenizers.",
        "commit": "Commit of this code, with -dirty for changes since; null outside a repository.",
        "thinned": "In a history that was thinned: how.",
        "experiment": "In a history that an experiment keeps: name of the experiment.",
        "variant": "In a history that an experiment keeps: name of the variant.",
    },
    "step": PHASE
    | STEP
    | TOKENS
    | {
        "lr": "The schedule's learning rate at the last step.",
        "lr_min": "The lowest learning rate that a parameter had in that step. After widening with "
        "`lr_scaling = width` matrices have the lowest, embeddings and norms the highest.",
        "lr_max": "The highest learning rate of a parameter.",
    }
    | STEP_MEASURES,
    "eval": PHASE
    | STEP
    | TOKENS
    | VALID_LOSSES
    | BITS_PER_BYTE
    | {
        "valid_loss_fp32": "Validation loss in float32, right after a growth. Missing elsewhere.",
        "above_growth": "How far the validation loss is above that just before the phase's growth. "
        "Below 0 the model is better. Missing once `eval_tokens` or `final_eval_tokens` has "
        "changed within the phase.",
        "expert_load": "For each layer, the share of the choices that each expert got. This and "
        "the next three are missing for a dense model.",
        "underused_experts": "Fraction of all experts that got less than a tenth of their fair "
        "share.",
        "router_entropy": "Mean entropy of the router's distribution over experts, in nats. The "
        "logarithm of the number of experts means no preference.",
        "top_k_margin": "Mean distance between the router logit of the last chosen expert and that "
        "of the first one left out. Near 0, rounding can change the choice.",
        "copy_distance": "Mean distance of copied output units from their originals, relative to "
        "these. 0: still alike. Missing before a widening.",
        "expert_distance": "Root mean square distance of two experts, relative to their size. 0: "
        "alike; 1.41: nothing in common. Missing for a dense model.",
    },
    "grow": PHASE
    | TOKENS
    | {
        "growth": "Name of the operator: `Upcycle`, `Widen` or `Deepen`.",
        "passed": "Whether the growth stayed within its limits.",
        "params_before": "Parameters before the growth.",
        "params_after": "Parameters after the growth.",
        "growth_s": "Seconds for the growth and its checks.",
        "valid_loss_fp32": "Validation loss in float32 just before the growth.",
        "loss_before": "Loss on the probe before the growth.",
        "loss_after": "Loss on the probe after the growth.",
        "loss_drift": "Mean change of the loss over the probe's tokens.",
        "max_logit_diff": "Largest difference of a logit, in float64 where the device has it.",
        "logit_limit": "How large `max_logit_diff` may be; null for no limit.",
        "max_logit_diff_fp32": "Largest difference of a logit in float32, most of which is "
        "float32's own rounding; null where float32's routing leaves too little to compare.",
        "kl": "Mean KL divergence of the new distribution from the old one, in nats.",
        "top1_changed": "Share of tokens whose likeliest successor changed.",
        "flipped": "Tokens of the probe that go to other experts.",
        "probe_tokens": "Tokens of the probe.",
        "flip_margin": "Largest lead, in the old router's logits, of an expert that a token left.",
        "margin_limit": "How large `flip_margin` may be.",
        "judged_share": "Share of the tokens that no changed routing can reach.",
        "plan_error": "Difference of the weight that is furthest from the sum of its copies, "
        "relative to the weight.",
        "plan_limit": "How large rounding may make `plan_error`.",
        "copy_distance": "Mean distance of copied output units from their originals, relative to "
        "these; null where nothing was copied.",
        "noise_std": "Spread of the noise of the matrix that is furthest from what was asked for, "
        "relative to that; null without noise.",
        "router_std": "Spread of the new router that is furthest from Xavier's law, relative to "
        "that law; null without a new router.",
        "load_min": "Smallest share of a layer's choices that an expert got on the probe; null for "
        "a dense model.",
        "load_max": "Largest share of the choices that an expert of a layer got.",
    },
    "checkpoint": PHASE
    | {
        "path": "File of the checkpoint.",
        "trained": "Whether the model was trained or has only grown. The fields below are there "
        "for a trained model.",
        "params": "Parameters of the model.",
        "active_params": "Parameters that a token passes through.",
        "phase_tokens": "Training tokens of the phase.",
        "phase_s": "Seconds that the phase took.",
        "samples": "Sample stories of the model.",
    }
    | STEP_MEASURES
    | VALID_LOSSES,
    "change": PHASE
    | STEP
    | TOKENS
    | {
        "setting": "Name of the setting, such as `training.lr_phase2`.",
        "old": "Its value before this step.",
        "new": "Its value from this step on.",
    },
    "end": TOKENS | {f"{kind}_s": f"Seconds of {text}." for kind, text in TIME_KINDS.items()},
}
"""The doc of each field, by event and field, without the fields of every event."""
