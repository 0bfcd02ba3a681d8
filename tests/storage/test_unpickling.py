"""Objects beside the tensors are not loaded, whatever the pickle says; the tensors are."""

import argparse
import collections
import contextlib
import copyreg
import os
import pathlib
import pickle
import struct
import zipfile
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cl_merge.errors import InputError
from cl_merge.storage import open_weights
from cl_merge.storage.unpickling import Placeholder, is_placeholder, read_without_code

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


class Sub(dict):
    """A mapping with a class of its own."""


class Nested:
    class Inner:
        def __init__(self):
            self.value = 1


OBJECTS = {
    "argparse": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "path": pathlib.PurePosixPath("/data"),
    "omegaconf": OmegaConf.create({"model": {"name": "vit", "sizes": [1, 2]}}),
    "nested class": Nested.Inner(),
    "dict with a class": Sub(a=1),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "namespace": SimpleNamespace(a=1),
    "set": {1, 2},
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "size": torch.Size([2]),
    "bound method": STATE["a"].shape.numel,
    "bytes": b"\0\xff",
    "function": os.path.join,
    "module": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("what", OBJECTS)
def test_an_object_beside_the_weights_does_not_matter(tmp_path, same, opened, what, protocol):
    content = {"args": OBJECTS[what], "state_dict": STATE, "list": [OBJECTS[what]]}
    torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
    same(opened(tmp_path / "m.pt"), STATE)


def test_a_lightning_checkpoint_with_hyper_parameters(tmp_path, same, opened):
    class Model(lightning.LightningModule):
        def __init__(self, args):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(3, 2)

    model = Model(OBJECTS["argparse"])
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    weights = opened(tmp_path / "m.ckpt")
    assert weights.kind == "Lightning checkpoint"
    same(weights, model.state_dict())


def test_a_file_is_read_by_the_own_reader_as_by_that_of_torch(tmp_path, tensors):
    strange = {"shared": STATE["a"][1:], "turned": STATE["a"].t(), "empty": torch.empty(0, 3)}
    parameter = {"p": torch.nn.Parameter(torch.ones(2)), "scalar": torch.tensor(3.0)}
    parameter["p"].note = parameter["scalar"].note = "an attribute"
    content = {"state": tensors | STATE | strange | parameter, "epoch": 3, "lr": (0.1, None, "x")}
    content["ordered"] = collections.OrderedDict(a=1)
    content["ordered"]._metadata = {"": {"version": 1}}
    torch.save(content, tmp_path / "m.pt")
    read = read_without_code(tmp_path / "m.pt")
    assert {**read, "state": 0} == {**content, "state": 0}
    assert list(read["state"]) == list(content["state"])
    for name, tensor in content["state"].items():
        assert read["state"][name].dtype == tensor.dtype, name
        assert read["state"][name].stride() == tensor.stride(), name
        both = [each.detach().contiguous().reshape(-1) for each in (read["state"][name], tensor)]
        assert both[0].view(torch.uint8).tolist() == both[1].view(torch.uint8).tolist()


def test_the_tensors_of_such_a_file_are_mapped(tmp_path, opened):
    torch.save({"state_dict": {"a": torch.zeros(20 << 20)}, "args": Sub()}, tmp_path / "m.pt")
    before = own_memory()
    weights = opened(tmp_path / "m.pt")
    assert not weights.read("a").any()
    assert own_memory() - before < 40 << 20  # of 80


def own_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_a_file_written_with_the_other_order_of_bytes(tmp_path):
    torch.save({"a": torch.tensor([1, 256], dtype=torch.int16), "x": Sub()}, tmp_path / "m.pt")
    changed = tmp_path / "big.pt"
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = b"big" if name.endswith("byteorder") else old.read(name)
            new.writestr(name, data)
    assert read_without_code(changed)["a"].tolist() == [256, 1]


KINDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(2, device="meta"),
    "conjugate": lambda: torch.ones(1, dtype=torch.cfloat).conj(),
    "parameter": lambda: torch.nn.Parameter(torch.eye(3).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_kind_is_refused_and_not_left_out(tmp_path, kind):
    torch.save({"a": torch.ones(1), "b": KINDS[kind](), "args": Sub()}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="'b' is a sparse, quantised"):
        open_weights(tmp_path / "m.pt")
    torch.save(STATE, tmp_path / "next.pt")
    open_weights(tmp_path / "next.pt").close()  # torch keeps a list of what is to be checked


def test_what_holds_objects_only_names_them(tmp_path):
    for content in (torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2), "epoch": 1}):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(InputError, match=r"holds Python objects \(torch.nn.modules.linear.Lin"):
            open_weights(tmp_path / "m.pt")


# ---- code


class Call:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Sprung:
    """Whether a trap has done anything: a file, or a change of this process."""

    def __init__(self, folder):
        self.file = folder / "sprung"
        self.command = f"touch {self.file}"

    def check(self):
        assert not self.file.exists()
        assert not hasattr(torch._utils._rebuild_tensor_v2, "polluted")
        assert not hasattr(torch.nn.Parameter, "polluted")
        assert not hasattr(collections.OrderedDict, "polluted")
        assert "polluted" not in vars(torch)
        assert not hasattr(Placeholder, "polluted")


def traps(command):
    """Pickles that run a command or change the process, if they are trusted."""
    text = repr(command).encode()
    line = b"import os; os.system(" + text + b")"

    def short(data):
        return b"\x8c" + bytes([len(data)]) + data

    polluted = b"(N}" + short(b"polluted") + b"K\x01st"
    return {
        "REDUCE": b"cos\nsystem\n(S" + text + b"\ntR.",
        "INST": b"(S" + text + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS" + text + b"\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\n(S" + text + b"\nt\x81.",
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(S" + text + b"\nt}\x92.",
        "STACK_GLOBAL": b"\x80\x04" + short(b"os") + short(b"system") + b"\x93S" + text + b"\n\x85R.",
        "dotted name": b"\x80\x04" + short(b"pathlib") + short(b"os.system") + b"\x93S" + text + b"\n\x85R.",
        "nested": b"\x80\x02}X\x01\0\0\0a]cos\nsystem\n(S" + text + b"\ntRas.",
        "exec": b"cbuiltins\nexec\n(S" + repr(line.decode()).encode() + b"\ntR.",
        "old builtins": b"c__builtin__\neval\n(S" + repr(f"__import__('os').system({command!r})").encode() + b"\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR(S" + text + b"\ntR.",
        "getattr of torch": b"cbuiltins\ngetattr\n(ctorch\nos\nS'system'\ntR(S" + text + b"\ntR.",
        "torch's os": b"ctorch\nos.system\n(S" + text + b"\ntR.",
        "torch as a name": b"ctorch.serialization\nos.system\n(S" + text + b"\ntR.",
        "torch.load": b"ctorch\nload\n(S" + text + b"\ntR.",
        "a call of a storage": b"ctorch\nFloatStorage\n(S" + text + b"\ntRcos\nsystem\n\x85R.",
        "a subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNS" + text + b"\n\x85}tR.",
        "set state": b"cos\nsystem\n" + polluted + b"b.",
        "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n" + polluted + b"b.",
        "state of Parameter": b"ctorch.nn.parameter\nParameter\n" + polluted + b"b.",
        "state of OrderedDict": b"ccollections\nOrderedDict\n" + polluted + b"b.",
        "state of a mapping": b"ccollections\nOrderedDict\n)R(}S'items'\ncos\nsystem\nstb.",
        "state with code": b"cargparse\nNamespace\n)R}S'__setstate__'\ncos\nsystem\nsbS" + text + b"\nb.",
        "append": b"cargparse\nNamespace\n)RS" + text + b"\na.",
        "set item": b"csys\nmodules\nS'os'\nNs.",
        "add items": b"\x80\x04csys\nmodules\n(S'os'\n\x90.",
    }  # fmt: skip


def archive(path, data):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/version", b"3\n")
    return path


NAMES = list(traps(""))


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_or_changes_anything(tmp_path, name):
    sprung = Sprung(tmp_path)
    path = archive(tmp_path / "m.pt", traps(sprung.command)[name])
    with contextlib.suppress(pickle.UnpicklingError, TypeError, AttributeError):
        found = read_without_code(path)
        assert not isinstance(found, int)  # what a shell would have returned
    with pytest.raises(InputError):
        open_weights(path)
    sprung.check()


@pytest.mark.parametrize(
    "name", ["REDUCE", "INST", "OBJ", "STACK_GLOBAL", "exec", "getattr of torch"]
)
def test_a_trap_does_what_it_says_where_it_is_trusted(tmp_path, name):
    """Else the tests of traps would be tests of nothing."""
    sprung = Sprung(tmp_path)
    pickle.loads(traps(sprung.command)[name])
    assert sprung.file.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_traps_beside_weights_are_left_alone(tmp_path, same, opened, protocol):
    sprung = Sprung(tmp_path)
    system, later = Call(os.system, (sprung.command,)), Call(exec, ("raise SystemExit",))
    content = {
        "state_dict": {**STATE, "extra": system},
        "args": {"a": [system, (later,)]},
        "sub": Call(getattr, (system, "x")),
        "state": Call(argparse.Namespace, (), {"a": system}),
        "items": Call(Sub, (), None, None, iter([("k", system)])),
        "elements": Call(list, (), None, iter([system])),
    }
    torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
    same(opened(tmp_path / "m.pt"), STATE)
    sprung.check()


def test_objects_that_the_process_has_registered_are_not_taken(tmp_path):
    sprung = Sprung(tmp_path)
    copyreg.add_extension("os", "system", 240)
    try:
        trap = b"\x80\x02\x82\xf0S" + repr(sprung.command).encode() + b"\n\x85R."
        pickle.loads(b"\x80\x02\x82\xf0.")  # from now on it is in a cache
        with pytest.raises(InputError):
            open_weights(archive(tmp_path / "m.pt", trap))
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()
    sprung.check()


def test_a_pickle_cannot_ask_for_memory_without_end(tmp_path):
    data = b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"cx\ny\n."
    with pytest.raises(InputError, match="pickle is damaged"):
        open_weights(archive(tmp_path / "m.pt", data))


def test_a_placeholder_says_what_it_stands_for(tmp_path):
    torch.save({"args": Nested.Inner()}, tmp_path / "m.pt")
    found = read_without_code(tmp_path / "m.pt")["args"]
    assert is_placeholder(found)
    assert not is_placeholder(Nested)
    assert "getattr" in found.origin or "Inner" in found.origin


@pytest.mark.parametrize(
    "tensor",
    [
        b"K\x00(K\x09t(K\x01t",  # longer than the storage
        b"K\x05(K\x02t(K\x01t",  # begins near its end
        b"J\xff\xff\xff\xff(K\x01t(K\x01t",  # begins before it
        b"K\x00(K\x02t(K\x40t",  # strides out of it
        b"K\x01(K\x02t(J\xff\xff\xff\xfft",  # backwards
        b"S'x'\n(K\x02t(K\x01t",
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, tensor):
    torch.save({"a": torch.ones(6), "x": Sub()}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        records = {name: file.read(name) for name in file.namelist()}
    (pickled,) = (name for name in records if name.endswith("data.pkl"))
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x06tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + tensor + b"\x89}tR"
    records[pickled] = b"\x80\x02}S'a'\n" + call + b"sS'x'\nca\nb\ns."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name, data in records.items():
            file.writestr(name, data)
    with pytest.raises(InputError, match="not a whole checkpoint"):
        open_weights(tmp_path / "m.pt")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_change_of_such_a_file_does_more_than_raise_an_error(tmp_path, data):
    path = tmp_path / "m.pt"
    content = {"args": argparse.Namespace(a=Sub(b=[1])), "model": STATE}
    torch.save(content, path)
    raw = bytearray(path.read_bytes())
    end = raw.index(b"byteorder") if data.draw(st.booleans()) else len(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(InputError), open_weights(path) as weights:
        for name in weights.names:
            weights.read(name).view(torch.uint8).sum()
