"""The registration of this library's methods in PEFT's tables."""

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from lowrank_ext.integrations.peft_tuner.config import config_class_for
from lowrank_ext.integrations.peft_tuner.tuner import tuner_class_for
from lowrank_ext.registry import METHODS

# The first with the hooks by which a tuner names the tensors of its files.
_OLDEST_PEFT = "0.21"


def register_with_peft() -> None:
    """Make PEFT know the methods of this library, for ``PeftModel.from_pretrained``.

    ``peft_config`` does so too. LoRA is PEFT's own method and stays it. Harmless when repeated.

    Raises:
        ImportError: PEFT is not installed, or older than 0.21.
    """
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        import peft

        raise ImportError(
            f"register_with_peft: needs PEFT {_OLDEST_PEFT} or newer, got {peft.__version__}; "
            "lr.adapt and lr.accelerate work with it"
        )
    for peft_type, method in METHODS.items():
        if peft_type not in list(PeftType):
            _add_peft_type(peft_type)
            register_peft_method(
                name=peft_type.lower(),
                config_cls=config_class_for(method),
                model_cls=tuner_class_for(method),
                prefix=f"{peft_type.lower()}_",
            )


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enum: ``register_peft_method`` takes no name that is not in it."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
