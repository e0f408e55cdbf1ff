"""Every exception and warning that this library raises on purpose. Nothing here does any work.

    HyperoptError                     catch this one to catch them all
    ├── DeclarationError              a @hyperparameter or a @knob cannot hold
    ├── ProblemError                  model, losses, data and inner optimizer do not fit together
    │   ├── LossError                 a loss is not a finite scalar that depends on the model
    │   ├── DataError                 data is empty, or cannot be iterated twice
    │   └── SecondDerivativeError     an operator of the training loss cannot be differentiated twice
    ├── BackendError                  a backend is unknown, has no such option, or cannot see a hyperparameter
    ├── HypergradientError            a hypergradient failed and the caller asked for an exception
    ├── AuxiliaryError                losses, labels or parameters do not fit a part of auxiliary learning
    ├── SearchError                   a study cannot be created or continued
    ├── CheckpointError               a checkpoint cannot be written, read, or continued by this run
    ├── DistributedError              the processes of a run differ, or one of them is lost
    └── CommandError                  the command line was given something it cannot use

    HyperoptWarning                   a run goes on, but its user should know something

A message states the rule, then what was found, then what to do.
"""


class HyperoptError(Exception):
    """Root of all exceptions of this library."""


class DeclarationError(HyperoptError):
    """A hyperparameter or a knob is declared in a way that cannot hold."""


class ProblemError(HyperoptError):
    """Model, losses, data and inner optimizer do not fit together."""


class LossError(ProblemError):
    """A loss is not a finite scalar that depends on the model's parameters."""


class DataError(ProblemError):
    """Training or validation data is empty, or cannot be iterated twice."""


class SecondDerivativeError(ProblemError):
    """An operator in the training loss has no second derivative."""


class BackendError(HyperoptError):
    """A backend is unknown, has no such option, or cannot see one of the hyperparameters."""


class HypergradientError(HyperoptError):
    """A hypergradient could not be computed, and the policy is to raise."""


class AuxiliaryError(HyperoptError):
    """Losses, labels or parameters do not fit a part of auxiliary learning."""


class SearchError(HyperoptError):
    """A study cannot be created or continued."""


class CheckpointError(HyperoptError):
    """A checkpoint cannot be written, cannot be read, or belongs to another run."""


class DistributedError(HyperoptError):
    """The processes of one run differ in what must be the same, or one of them is lost."""


class CommandError(HyperoptError):
    """The command line was given something that it cannot use."""


class HyperoptWarning(UserWarning):
    """The run goes on, but its user should know something."""
