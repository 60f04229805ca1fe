import pytest
from injected import Injected

from resnet_fused import backends
from resnet_fused.backends import dispatch
from resnet_fused.backends.selfcheck import judge


@pytest.fixture
def inject(monkeypatch, tmp_path):
    """Puts a backend with one kernel before all others; nothing is remembered from before, in memory or on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge.forget()

    def put(*args, **kwargs):
        injected = Injected(*args, **kwargs)
        monkeypatch.setattr(dispatch, "_backends", {"injected": injected.backend, **backends.backends()})
        return injected

    yield put
    judge.forget()
