"""Any transformers causal language model, as a backbone that ends in hidden states and a head that is not applied.

The head's weight, its scale and its soft-capping go into a :class:`~kd_kernels.LinearLogits`, so ``[N, V]`` logits are
not computed. Because a scale that was overlooked would train towards the wrong distribution without a sign, every
model is compared once, on eight tokens, with the logits of its own ``forward``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd_kernels import EnsembleLogits, LinearLogits
from kd_trainer import assets
from kd_trainer.data import Batch, Document, collate
from kd_trainer.errors import fail
from kd_trainer.memory import check_fits, weight_bytes

PROBE_LENGTHS = (3, 5)
TOO_LARGE = (
    "load it in bfloat16 (teacher.dtype, student.dtype or --dtype), or, for a teacher, build its cache where it fits "
    "(kdk cache build) and train from that"
)

FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")
"""What architectures call the norm between the last layer and the head."""


class CausalLM(nn.Module):
    """A causal language model whose forward gives :class:`~kd_kernels.LinearLogits` at the rows of a batch.

    Args:
        model: what ``AutoModelForCausalLM`` returns.
        vocab: the tokenizer's number of ids. Columns of the head past it are padding: they count as -inf, which makes
            models of one tokenizer comparable whatever their heads were padded to. None: all columns.

    Raises:
        ValueError: no head or no backbone is found, or head and backbone do not reproduce the model's own logits.
    """

    def __init__(self, model: PreTrainedModel, vocab: int | None = None) -> None:
        super().__init__()
        check_head(model)
        self.model = model
        self.scale, self.softcap = head_transform(model.config)
        columns = self.head.weight.shape[0]
        self.valid_vocab = vocab if vocab is not None and vocab < columns else None
        self.vocab = self.valid_vocab or columns
        self._check_head()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def hidden(self, batch: Batch) -> Tensor:
        """``[N, H]``: last hidden states, after the final norm, at the rows of the batch."""
        output = self.model.get_decoder()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[batch.rows]

    def hidden_of_layers(self, batch: Batch) -> Tensor:
        """``[L, N, H]``: what each layer leaves, after the final norm, at the rows of the batch; the last is
        :meth:`hidden`."""
        decoder = self.model.get_decoder()
        output = decoder(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
        )
        norms = [module for name, module in decoder.named_children() if name in FINAL_NORMS]
        if len(norms) != 1:
            fail(
                "CausalLM", f"the final norm of {type(self.model).__name__}", "one of " + ", ".join(FINAL_NORMS),
                ", ".join(name for name, _ in decoder.named_children()), "early exits pass through it",
            )
        # The first is the embeddings; transformers applies the norm to the last one itself.
        *inner, last = [states.flatten(0, 1)[batch.rows] for states in output.hidden_states[1:]]
        return torch.stack([*map(norms[0], inner), last])

    def states(
        self, sees: Tensor, position_ids: Tensor, *, input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``[B, R, H]``: last hidden states where column i of a row attends to the columns that it ``sees``.

        Args:
            sees: bool ``[B, R, R]``; every column sees itself. :meth:`check_masks` says whether a model obeys it.
            position_ids: int64 ``[B, R]``.
            input_ids, inputs_embeds: one of int64 ``[B, R]`` and floats ``[B, R, H]``.
        """
        dtype = self.head.weight.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        output = self.model.get_decoder()(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=mask[:, None], position_ids=position_ids,
            use_cache=False,
        )
        return output.last_hidden_state

    def logits_of(self, hidden: Tensor) -> LinearLogits:
        """What stands for the logits of hidden states ``[..., H]`` that the final norm has been applied to."""
        head = self.head  # which transformers looks for at length
        return LinearLogits(
            hidden, head.weight, getattr(head, "bias", None), scale=self.scale, softcap=self.softcap,
            valid_vocab=self.valid_vocab,
        )

    def forward(self, batch: Batch) -> LinearLogits:
        """What stands for the ``[N, V]`` logits of the batch's rows."""
        return self.logits_of(self.hidden(batch))

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare with the model's own logits on a few tokens: nothing about an architecture is taken on trust."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(sum(PROBE_LENGTHS), device=self.device) * 7 % self.vocab
        document = Document(torch.cat([ids, ids[:1]]).cpu())  # its last token is only predicted
        ours = dense_logits(self(collate([document], len(document)).to(self.device)))
        own = self.model(input_ids=ids[None], use_cache=False).logits[0, :, : self.vocab].float()
        self.model.train(training)
        error = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
        limit = 1e-3 if self.head.weight.dtype == torch.float32 else 3e-2
        if not error <= limit:
            fail(
                "CausalLM", f"head(backbone(x)) of {type(self.model).__name__}",
                f"the model's own logits to {limit:g} with scale={self.scale:g} and softcap={self.softcap}",
                f"a relative error of {error:.2g}",
                "this architecture changes its logits in a way that is not known here",
            )

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise where documents that share a row see each other (recurrent layers, for one, carry a state across)."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(sum(PROBE_LENGTHS)) * 7 % self.vocab
        documents = [Document(part) for part in ids.split(PROBE_LENGTHS)]
        packed = self.hidden(collate(documents, len(ids)).to(self.device))
        alone = torch.cat([self.hidden(collate([document], len(ids)).to(self.device)) for document in documents])
        self.model.train(training)
        error = float((packed - alone).abs().max() / alone.abs().max())
        if not error <= (1e-3 if packed.dtype == torch.float32 else 5e-2):
            fail(
                "CausalLM", f"packing of {type(self.model).__name__}", "without effect on what a document's rows see",
                f"a relative change of {error:.2g}", "set data.packing=false",
            )

    @torch.no_grad()
    def check_masks(self) -> None:
        """Raise where a model does not obey the masks that :meth:`states` hands to it."""
        training = self.model.training
        self.model.eval()
        ids = torch.arange(sum(PROBE_LENGTHS)) * 7 % self.vocab
        documents = [Document(part) for part in ids.split(PROBE_LENGTHS)]
        batch = collate(documents, len(ids)).to(self.device)
        masked = self.states(causal(batch.position_ids), batch.position_ids, input_ids=batch.input_ids)
        alone = torch.cat([self.hidden(collate([document], len(ids)).to(self.device)) for document in documents])
        self.model.train(training)
        error = float((masked.flatten(0, 1)[batch.rows] - alone).abs().max() / alone.abs().max())
        if not error <= (1e-3 if masked.dtype in (torch.float32, torch.float64) else 5e-2):
            fail(
                "CausalLM", f"the attention of {type(self.model).__name__}", "by the mask that it is given",
                f"a relative change of {error:.2g}", "take a model whose layers all attend through a mask",
            )


def check_head(model: PreTrainedModel) -> None:
    """Raise where a model has no linear head, or no backbone below it, by the names that transformers gives them."""
    where = type(model).__name__
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        fail(
            "CausalLM", f"get_output_embeddings() of {where}", "a linear head with a 2-d weight, such as lm_head",
            "none" if head is None else type(head).__name__, "give a model of an AutoModelForCausalLM class",
        )
    if model.get_decoder() is model:
        fail("CausalLM", f"get_decoder() of {where}", "the module below the head", "the model itself")


def causal(position_ids: Tensor) -> Tensor:
    """bool ``[B, R, R]``: a column sees itself and those before it in its segment; positions ``[B, R]`` are 0 at its
    start."""
    segments = (position_ids == 0).cumsum(1)
    return (segments[:, :, None] == segments[:, None, :]).tril()


def head_transform(config: object) -> tuple[float, float | None]:
    """``(scale, softcap)`` that a model's configuration puts between its head's product and its logits."""
    config = config.get_text_config()
    get = lambda name: getattr(config, name, None)  # noqa: E731
    scale = 1.0
    if isinstance(get("logit_scale"), (int, float)):  # Cohere
        scale = float(get("logit_scale"))
    elif get("lm_head_multiplier") is not None:  # Falcon-H1
        scale = float(get("lm_head_multiplier"))
    elif get("logits_scaling") is not None:  # Granite divides by it, HyperCLOVA X multiplies
        factor = float(get("logits_scaling"))
        scale = factor if config.model_type.startswith("hyperclovax") else 1.0 / factor
    softcap = get("final_logit_softcapping") or get("logits_soft_cap")  # Gemma 2 to 4, NanoChat; RecurrentGemma
    return scale, None if softcap is None else float(softcap)


def rows_of(logits: LinearLogits | EnsembleLogits, rows: Tensor) -> LinearLogits | EnsembleLogits:
    """The given rows (int64) of a noun."""
    if isinstance(logits, EnsembleLogits):
        weights = logits.weights[rows] if isinstance(logits.weights, Tensor) else logits.weights
        return dataclasses.replace(
            logits, members=tuple(rows_of(member, rows) for member in logits.members), weights=weights
        )
    return dataclasses.replace(logits, hidden=logits.hidden[rows])


def logits_at(logits: LinearLogits, ids: Tensor) -> Tensor:
    """fp32 (fp64 of fp64) ``[N]``: the logit of one id (int64) a row, differentiable; 2 N H operations."""
    dtype = torch.promote_types(logits.hidden.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        found = (logits.hidden.to(dtype) * logits.weight[ids].to(dtype)).sum(-1)
    found = (found if logits.bias is None else found + logits.bias[ids].to(dtype)) * logits.scale
    return found if logits.softcap is None else logits.softcap * torch.tanh(found / logits.softcap)


def dense_logits(logits: LinearLogits) -> Tensor:
    """fp32 (fp64 of fp64) ``[N, V]`` logits of a *few* rows: to compare models, in chunks, and for the check above."""
    weight, bias = logits.weight[: logits.vocab], None if logits.bias is None else logits.bias[: logits.vocab]
    dtype = torch.promote_types(logits.hidden.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        product = logits.hidden.to(dtype) @ weight.to(dtype).T
    product = (product if bias is None else product + bias.to(dtype)) * logits.scale
    return product if logits.softcap is None else logits.softcap * torch.tanh(product / logits.softcap)


# ------------------------------------------------------------------------------------------------------ loading


def resolve(name: str) -> str:
    """A model's name as transformers takes it: the names of :mod:`kd_trainer.assets` become folders."""
    if name == assets.SMOLLM2:
        return str(assets.smollm2())
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"load_model: model must be a name or an existing folder, got {name!r}")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model."""
    return _from_pretrained(AutoTokenizer.from_pretrained, name, "tokenizer")


def load_pretrained(name: str, dtype: str = "float32") -> PreTrainedModel:
    """A transformers causal language model in evaluation mode, with its weights in ``dtype``."""
    config = _from_pretrained(AutoConfig.from_pretrained, name, "configuration")
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        head = "of a class with a language-model head (lm_head)"
        fail("load_model", "model", head, f"{name!r}, a {config.model_type}")
    if not hasattr(config, "auto_map"):  # the class of those is not known before its code is run
        needed = weight_bytes(config, getattr(torch, dtype))
        check_fits("load_model", "model", name, needed, torch.device("cpu"), TOO_LARGE)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))  # noqa: E731
    return _from_pretrained(load, name, "model").eval()


def _from_pretrained(load, name: str, what: str):
    path = resolve(name)
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_model: model must be a name or a folder that transformers finds a {what} in, got {name!r} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def vocab_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a tokenizer, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, model: str, whose: str) -> None:
    """A model must mean the same tokens by the same ids as the tokenizer that the text is read with."""
    own, used = load_tokenizer(model).get_vocab(), tokenizer.get_vocab()
    if own != used:
        differing = sorted(own.items() ^ used.items(), key=lambda item: item[1])
        token, index = differing[0]
        fail(
            "load_model", f"the vocabulary of {whose} ({model})", "that of the tokenizer in use",
            f"{len(differing)} entries that differ, the first {token!r} with id {index}",
            "teacher and student must share a tokenizer",
        )


def cut_layers(model: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """A student made of some layers of a model, in the given order, and copies of everything else.

    Raises:
        ValueError: a layer that the model does not have, or a model whose layers are not found.
    """
    total = model.config.num_hidden_layers
    if not layers or any(not 0 <= layer < total for layer in layers):
        fail("cut_layers", "student.layers", f"layers of the teacher in 0..{total - 1}", list(layers))
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(stacks) != 1:
        fail(
            "cut_layers", type(model).__name__, f"a model with one ModuleList of {total} layers",
            ", ".join(stacks) or "none", "give student.model instead",
        )
    prefix = f"{stacks[0]}."
    config = copy.deepcopy(model.config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # one entry a layer, such as layer_types
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    student = type(model)(config).to(next(model.parameters()).dtype)
    source = model.state_dict()
    weights = {name: tensor for name, tensor in source.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        weights |= {
            f"{prefix}{new}.{name[len(start):]}": tensor for name, tensor in source.items() if name.startswith(start)
        }
    student.load_state_dict(weights)
    return student.eval()


# ------------------------------------------------------------------------------------------------- fingerprints


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every weight (name, dtype, shape, bytes) and the configuration.

    Where the model was loaded from and by which version does not enter, so a copy has the same fingerprint; the dtype
    does, because rounded weights are another teacher. Reads every weight once.
    """
    transient = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in transient}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """What JSON has no form for. A set has another order in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, merges and the rest of the pipeline, and special tokens: what makes ids of a text."""
    parts: dict[str, object] = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
    }
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        pipeline = json.loads(backend.to_str())
        parts["pipeline"] = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template (or templates) that a tokenizer makes a text of messages with; ``"none"`` without one."""
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else "none"


def bos_policy(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special ids that a tokenizer puts around a text of its own accord, such as ``"1 text"``, or ``"none"``."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True)["input_ids"]
    if inner == outer:
        return "none"
    at = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), None)
    if at is None:
        fail(
            "bos_policy", "the tokenizer", "one that puts special tokens around a text",
            f"{outer} for 'a', which is {inner}"
        )
    return " ".join(map(str, [*outer[:at], "text", *outer[at + len(inner) :]]))


def reading_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    """BOS policy and fingerprint of the chat template that documents were read with; None where they came as ids."""
    origins = {document.origin for document in documents}
    if "tokens" in origins:
        return None, None
    return bos_policy(tokenizer), chat_template_fingerprint(tokenizer) if "chat" in origins else "none"
