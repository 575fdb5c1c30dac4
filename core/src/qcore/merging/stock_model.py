"""Stock transformers and PEFT on a model folder, whole or one layer in memory at a time.

This file decides how the stock classes are loaded (float32, eager attention, safetensors alone, no
remote code), which class, and how their layers are observed. Every number is computed by their
code: its forward pass, its masks and positions, its conversion of file names to parameters. With
``whole=False`` parameters have no storage; those of a layer are loaded by transformers from the
tensors of that layer before it runs, and dropped after it. What is compared is decided in
`against_stock`.

Shapes: N documents, T tokens of the longest, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapter.weight_files import adapter_headers, join_command, weight_files
from ..checkpoint.checkpoint import Checkpoint
from ..errors import InputError, NumericError
from .stock_class import quiet, refusals, refuse_code, stock_class

#: What the wrappers of PEFT add to the path of a parameter of the base.
_WRAPPED = re.compile(r"\b(base_layer|original_module|token_adapter)\.")


class OtherOrder(TorchFunctionMode):
    """Adds the products of every linear map in reverse order: equal up to rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs:
            x, weight, *bias = args
            return func(x.flip(-1), weight.flip(-1), *bias)
        return func(*args, **(kwargs or {}))


class Call:
    """One layer of the stock model, as its forward pass called it.

    Attributes:
        number: of the layer.
        x: its input ``[N, T, H]``.
        out: its output ``[N, T, H]``.
        layer: the module, with its weights.
    """

    def __init__(self, number: int, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self.number, self.layer, self._rest, self._kwargs = number, layer, args[1:], kwargs
        self.x: Tensor = args[0] if args else kwargs["hidden_states"]
        self._named = not args
        self.out: Tensor = first(out)

    def again(self, x: Tensor) -> Tensor:
        """The layer on another input, with the masks and positions of the call."""
        forward = self.layer.forward
        if self._named:
            return first(forward(**(self._kwargs | {"hidden_states": x})))
        return first(forward(x, *self._rest, **self._kwargs))


def first(out: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


class StockModel:
    """A model folder under a stock class, with a PEFT adapter or without.

    Args:
        checkpoint: the folder.
        name: of the class in transformers, or of an Auto class; ``None``: that of config.json.
        layers: names on disk of the tensors of each layer of the trunk.
        adapter: an adapter folder in PEFT's format.
        whole: load all weights at once.

    Attributes:
        model: the stock class.
        peft: the PEFT model around it; ``None`` without an adapter.
        random: parameters that text does not run, as of a tower that the folder does not have;
            transformers leaves them at random values.

    Raises:
        InputError: ``QC-STOCK-004`` the stock class does not load the folder.
        NumericError: ``QC-STOCK-009`` it would leave a parameter at random values.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str | None = None,
        layers: list[list[str]],
        adapter: Path | None = None,
        whole: bool = True,
    ) -> None:
        self.checkpoint, self.whole, self._layers = checkpoint, whole, layers
        self.random: list[str] = []
        refuse_code(checkpoint.path)
        with quiet(), refusals(checkpoint.path):
            self.cls, self.config = stock_class(checkpoint.path, name)
            self.model = self._whole() if whole else self._skeleton()
            self.peft = None if adapter is None else self._peft(adapter)
        self.model.eval()
        trunks = [m for m in self.model.modules() if hasattr(m, "layers") and hasattr(m, "norm")]
        if not trunks or self.model.get_output_embeddings() is None:
            raise InputError(
                "QC-STOCK-004",
                f"is loaded as {self.cls.__name__}, which is not a language model",
                file=checkpoint.path,
                fix="name another class with --stock-class",
            )
        self.trunk = trunks[0]

    def _whole(self) -> Any:
        model, info = self.cls.from_pretrained(
            self.checkpoint.path,
            config=self.config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        missing = set(info["missing_keys"])
        if model.get_output_embeddings() is not None:
            self.random = sorted(missing - _of_text(model))
        self._refuse_missing(missing.difference(self.random))
        return model

    def _skeleton(self) -> Any:
        from accelerate import init_empty_weights

        config = copy.deepcopy(self.config)
        config._attn_implementation = "eager"
        with init_empty_weights(include_buffers=False):
            model = self.cls(config)
        _drop(model)
        model.tie_weights()  # PEFT wraps a tied head in another way
        return model

    def _refuse_missing(self, names: Any) -> None:
        if names:
            raise NumericError(
                "QC-STOCK-009",
                f"lacks parameters of {self.cls.__name__}, which transformers would leave at "
                "random values",
                file=self.checkpoint.path,
                field=min(names),
                found=f"{len(names)} missing",
                fix="restore the weights, or name the class with --stock-class",
            )

    def _peft(self, adapter: Path) -> Any:
        import peft

        refuse_code(adapter)
        if len(files := weight_files(adapter)) > 1:
            raise InputError(
                "QC-STOCK-004",
                "has its weights in several files, of which stock PEFT reads none",
                file=adapter,
                found=f"{len(files)} files",
                fix=join_command(files),
            )
        try:
            return peft.PeftModel.from_pretrained(self.model, str(adapter))
        except (ValueError, TypeError) as error:
            raise NumericError(
                "QC-STOCK-007",
                f"is refused by stock PEFT under {self.cls.__name__}",
                file=adapter,
                field=min(header.name for header in adapter_headers(adapter)),
                found=str(error)[:300],
                fix="name the class that the adapter was trained on with --stock-class",
            ) from error

    def bound(self) -> set[str]:
        """Names of the adapter's tensors under this class, as PEFT would save them."""
        import peft

        with quiet():
            return {*peft.get_peft_model_state_dict(self.peft)}

    @contextmanager
    def adapted(self, on: bool) -> Iterator[None]:
        """Run with the adapter, or without it."""
        with ExitStack() as stack:
            if self.peft is not None and not on:
                stack.enter_context(self.peft.disable_adapter())
            yield

    def run(self, ids: Tensor, observe: Callable[[Call], None]) -> Tensor:
        """The stock forward pass of the trunk.

        Args:
            ids: ``[N, T]``, padded on the right; later tokens change no earlier ones.
            observe: called after each layer, while its weights are in memory.

        Returns:
            What the head reads, ``[N, T, H]``.
        """

        def after(number: int, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            observe(Call(number, layer, args, kwargs, out))

        with ExitStack() as stack, torch.no_grad(), quiet():
            if not self.whole:
                self._stream(stack)
            for number, layer in enumerate(self.trunk.layers):
                hook = layer.register_forward_hook(partial(after, number), with_kwargs=True)
                # Before the hook that drops the weights.
                layer._forward_hooks.move_to_end(hook.id, last=False)
                layer._forward_hooks_with_kwargs.move_to_end(hook.id, last=False)
                stack.callback(hook.remove)
            body = getattr(self.model, self.model.base_model_prefix)
            hidden: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
            return hidden

    def norm(self, x: Tensor) -> Tensor:
        """The stock model's norm after the last layer."""
        norm = self.trunk.norm
        if not self.whole:
            self._fill(norm, self._tensor_of(norm))
        with torch.no_grad():
            out: Tensor = norm(x)
            return out

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` of rows ``[n, H]``."""
        head = self.model.get_output_embeddings()
        if not self.whole:
            self._fill(head, self._tensor_of(head))
        with torch.no_grad():
            out: Tensor = head(x)
        if not self.whole:
            _drop(head)
        return out

    def _stream(self, stack: ExitStack) -> None:
        """Load the weights of each module before it runs, and drop them after it."""

        def load(values: Callable[[], Mapping[str, Tensor]], module: nn.Module, _: Any) -> None:
            self._fill(module, values())

        modules = [(m, partial(self._tensor_of, m)) for m in self._outside()]
        modules += [
            (layer, partial(self._layer, number)) for number, layer in enumerate(self.trunk.layers)
        ]
        for module, values in modules:
            stack.callback(module.register_forward_pre_hook(partial(load, values)).remove)
            stack.callback(module.register_forward_hook(lambda m, *_: _drop(m)).remove)

    def _outside(self) -> list[nn.Module]:
        return [self.trunk.embed_tokens, self.trunk.norm]

    def _tensor_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The weight of the embedding, the last norm or the head, from the files."""
        trunk = f"{self._prefix()}"
        names = {
            id(self.trunk.embed_tokens): f"{trunk}embed_tokens.weight",
            id(self.trunk.norm): f"{trunk}norm.weight",
        }
        name = names.get(id(module), "lm_head.weight")
        if name not in self.checkpoint.headers and id(module) not in names:
            name = f"{trunk}embed_tokens.weight"  # a tied head
        self._refuse_missing([name] if name not in self.checkpoint.headers else [])
        return {"weight": self._read([name])[name].float()}

    def _prefix(self) -> str:
        """What precedes ``layers.N`` in the files."""
        return re.split(r"layers\.\d+\.", self._layers[0][0])[0]

    def _layer(self, number: int) -> dict[str, Tensor]:
        """The parameters of a layer, which transformers loads into a model of one layer."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = copy.deepcopy(self.config.get_text_config())
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 2, None
        config.tie_word_embeddings = False
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number]]
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        own = f"{cls.base_model_prefix}.layers.0."
        values = self._read(self._layers[number])
        pattern = re.compile(rf"^.*?layers\.{number}\.")
        with quiet():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict={pattern.sub(own, name): values.pop(name) for name in list(values)},
                dtype=torch.float32,
                output_loading_info=True,
            )
        self._refuse_missing(
            [f"layers.{number}.{n.removeprefix(own)}" for n in info["missing_keys"] if own in n]
        )
        layer = getattr(model, cls.base_model_prefix).layers[0]
        return dict(layer.named_parameters())

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by their names on disk."""
        values: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.checkpoint.headers[name].file for name in names):
            with safe_open(self.checkpoint.file(file), "pt") as opened:
                for name in names:
                    if self.checkpoint.headers[name].file == file:
                        values[name] = opened.get_tensor(name)
        return values

    def _fill(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Give a module its weights, below the wrappers that PEFT puts around them."""
        for path, parameter in list(module.named_parameters()):
            name = _WRAPPED.sub("", path)
            if name in values and not _is_adapters(path):
                holder = module.get_submodule(path.rpartition(".")[0])
                value = values[name].detach()
                if value.shape != parameter.shape:
                    raise InputError(
                        "QC-STOCK-004",
                        "does not have the shape that the stock class expects",
                        file=self.checkpoint.path,
                        field=name,
                        found=list(value.shape),
                        expected=list(parameter.shape),
                        fix="restore the weights",
                    )
                leaf = path.rpartition(".")[2]
                holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _is_adapters(path: str) -> bool:
    """Whether PEFT added a parameter to the model."""
    return any(word in path for word in ("lora_", "modules_to_save.", "trainable_tokens_"))


def _of_text(model: Any) -> set[str]:
    """Names of the parameters that text runs: those of the trunk and of the head."""
    trunks = [m for m in model.modules() if hasattr(m, "layers") and hasattr(m, "norm")]
    used = [module for module in (*trunks[:1], model.get_output_embeddings()) if module is not None]
    own = {id(parameter) for module in used for parameter in module.parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if id(parameter) in own}


def _drop(module: nn.Module) -> None:
    """Replace the weights of a module, except an adapter's, by NaN without storage.

    They are not on the meta device, because PEFT moves an adapter to the device of its base.
    """
    for path, parameter in list(module.named_parameters()):
        if not _is_adapters(path):
            holder = module.get_submodule(path.rpartition(".")[0])
            nothing = torch.full((), torch.nan).expand(parameter.shape)
            holder._parameters[path.rpartition(".")[2]] = nn.Parameter(nothing, requires_grad=False)
