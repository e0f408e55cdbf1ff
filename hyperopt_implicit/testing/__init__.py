"""The conformance suite that any backend, ours or a stranger's, must pass; see :class:`BackendConformance`."""

from hyperopt_implicit.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]
