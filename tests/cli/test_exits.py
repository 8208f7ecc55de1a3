import pytest
import torch

from minigpt.cli.exits import orderly_exit
from minigpt.core.process import preserved_process


def test_error_that_follows_from_ctrl_c_is_one_line(capsys):
    """OmegaConf, for example, fails while it restores its flags after a KeyboardInterrupt."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("a flag")

    with preserved_process(), pytest.raises(SystemExit) as leaving, orderly_exit("evaluate"):
        interrupted()
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    with preserved_process(), pytest.raises(AttributeError), orderly_exit("evaluate"):
        raise AttributeError("a bug")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more"),
        RuntimeError("CUDA error: out of memory\nAnd more"),
    ],
    ids=["of PyTorch", "of CUDA"],
)
def test_full_gpu_memory_is_one_line_that_names_the_cpu(error, capsys):
    with preserved_process(), pytest.raises(SystemExit) as leaving, orderly_exit("study"):
        raise error
    assert leaving.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA_VISIBLE_DEVICES=" in line
