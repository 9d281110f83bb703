"""Reads a published config.json so that nothing in it is lost: a field is honoured, refused, or known to change no number."""

import json
from typing import Any

from mdl.precision import Float, PrecisionConfig

# Fields of published files that change no number of the forward pass: names of things, generation defaults, training remnants.
WITHOUT_EFFECT = frozenset(
    """_attn_implementation _name_or_path architectures auto_map aux_loss_alpha bos_token_id do_sample eos_token_id ep_size id2label
    label2id max_length max_new_tokens max_window_layers min_length num_labels output_attentions output_hidden_states
    output_router_logits pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef seq_aux task_specific_params
    temperature tokenizer_class top_k top_p transformers_version use_cache""".split()  # noqa: SIM905, one line each is longer
)
_DTYPES: dict[str, Float] = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}


class Fields:
    """The fields of one JSON object; every read is noted. All errors are ValueErrors that name field and value."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def refusal(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self._where}: {name}={_spell(self._values.get(name))}: {reason}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self.refusal(name, "an integer is expected")
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if self.has(name) else self._get(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(name, "a number is expected")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else self._get(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refusal(name, "true or false is expected")
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise self.refusal(name, "a text is expected")
        return value

    def integers(self, name: str) -> list[int]:
        value = self._get(name) or []
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise self.refusal(name, "a list of integers is expected")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._get(name) or []
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self.refusal(name, "a list of texts is expected")
        return value

    def child(self, name: str) -> "Fields":
        """The object in the field; an empty one if it is absent or null."""
        value = self._get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "an object is expected")
        return Fields(value or {}, f"{self._where}: {name}")

    def only(self, name: str, *supported: Any) -> None:
        """Refuses values other than these; absent and null pass."""
        value = self._get(name)
        if value is not None and not any(type(value) is type(s) and value == s for s in supported):
            spelled = " or ".join(map(_spell, supported))
            raise self.refusal(name, f"only {spelled} is supported" if spelled else "is not supported")

    def ignore(self, name: str) -> None:
        """Notes that the field changes nothing in this family."""
        self._read.add(name)

    def refuse_unread(self) -> None:
        """ValueError for fields that nobody has read, unless they are off or known to change no number."""
        for name, value in self._values.items():
            known = name in self._read or name in WITHOUT_EFFECT
            if not known and value is not None and value is not False:
                raise self.refusal(name, "unknown field; it may change the model's numbers, remove it if it does not")


def precision(fields: Fields) -> PrecisionConfig:
    """Computes in the dtype that the checkpoint says it has; float16 in float32, which holds it."""
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    stored = fields.text(name) if fields.has(name) else "float32"
    if fields.has("torch_dtype"):
        fields.text("torch_dtype")
    if stored not in _DTYPES:
        raise fields.refusal(name, f"only {', '.join(_DTYPES)} are supported")
    return PrecisionConfig(param=_DTYPES[stored], compute=_DTYPES[stored])


def _spell(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
