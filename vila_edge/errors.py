"""What can go wrong, and how the command line reports it.

VilaEdgeError                exit code 1
├── UsageError               2  the call itself makes no sense
├── InputError               3  something that was handed in is not usable
│   ├── ImageError              an image file or array
│   ├── PromptError             a prompt and its `<image>` marks
│   │   └── ContextError        a prompt longer than the model's context
│   ├── ConfigError             a field of a config.json
│   ├── CheckpointError         trained weights
│   └── BundleError             a bundle that is missing, half written or changed
├── ParityError              1  an export that does not compute what its checkpoint computes
└── BackendError             5  a backend that cannot run here

`message` names the file or field, what was found and what was expected. `hint` says what to do.
"""

from __future__ import annotations


class VilaEdgeError(Exception):
    """An error that a user can act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(VilaEdgeError):
    """The call itself makes no sense."""

    exit_code = 2


class InputError(VilaEdgeError):
    """Something that was handed in is not usable."""

    exit_code = 3


class ImageError(InputError):
    """A file or array that is not a usable image."""


class PromptError(InputError):
    """A prompt whose text and images do not fit together."""


class ContextError(PromptError):
    """A prompt longer than the context."""


class ConfigError(InputError):
    """A field of a config.json that is missing, wrong or not understood."""


class CheckpointError(InputError):
    """Trained weights that are missing, damaged or of another shape."""


class BundleError(InputError):
    """A bundle that is missing, half written, changed or of another version."""


class ParityError(VilaEdgeError):
    """An export that does not compute what its checkpoint computes."""


class BackendError(VilaEdgeError):
    """A backend that cannot run on this machine."""

    exit_code = 5
