"""What is merged loads straight into where the inputs came from."""

import json

import pytest
import torch
from file_cases import in_memory, listed, read, same_bits, tuned, write
from plain import Plain, fit, loader, trainer
from safetensors.torch import load_file, save_file

from cl_merge.callbacks import MergeCallback
from cl_merge.merge_files import merge_checkpoints
from cl_merge.task_vectors.task_vector import TaskVector

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "layers": 1, "heads": 2},
}


def write_open_clip(folder, weights, pickled=False):
    folder.mkdir()
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_open_clip_loads_what_was_merged(tmp_path, pickled):
    import open_clip

    base = open_clip.CLIP(**TINY_CLIP).state_dict()
    tasks = [tuned(base, seed) for seed in range(2)]
    base_folder = write_open_clip(tmp_path / "base", base, pickled)
    folders = [write_open_clip(tmp_path / f"task{i}", t, pickled) for i, t in enumerate(tasks)]
    merge_checkpoints(
        base_folder, folders, tmp_path / "merged", method="ties", include=["visual.*"]
    )
    model = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}")
    chosen = [name for name in base if name.startswith("visual.")]
    part = {name: base[name] for name in chosen}
    parts = [{name: task[name] for name in chosen} for task in tasks]
    assert same_bits(model.state_dict(), {**base, **in_memory(part, parts, "ties")})


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_transformers_loads_what_was_merged(tmp_path, shard):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(BertForMaskedLM(config).eval())  # with tied weights
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size=shard)
    output, size = tmp_path / "merged", 10_000 if shard == "10KB" else 10**9
    merge_checkpoints(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], output, shard_bytes=size)
    assert ("model.safetensors.index.json" in listed(output)) == (shard == "10KB")
    merged = BertForMaskedLM.from_pretrained(output)
    base, *tasks = (model.state_dict() for model in models)
    assert same_bits(merged.state_dict(), in_memory(base, tasks, "magmax"))
    # It is a model like any other: save it, and merge into it again.
    merge_checkpoints(output, [tmp_path / "1"], tmp_path / "again", shard_bytes=size)
    assert listed(tmp_path / "again") == listed(output)


def test_lightning_checkpoints_merge_into_what_a_module_loads(tmp_path):
    module, paths = Plain(batch_norm=True), []
    run = trainer(max_epochs=0)
    run.fit(module, loader(0))
    run.save_checkpoint(tmp_path / "base.ckpt")
    base, tasks = {n: t.clone() for n, t in module.state_dict().items()}, []
    for task in range(2):
        run = trainer()
        run.fit(module, loader(task))
        paths.append(tmp_path / f"task{task}.ckpt")
        run.save_checkpoint(paths[-1])
        tasks.append({n: t.clone() for n, t in module.state_dict().items()})
    merge_checkpoints(tmp_path / "base.ckpt", paths, tmp_path / "m.safetensors", method="average")
    other = Plain(batch_norm=True)
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    statistics = {n: t for n, t in tasks[-1].items() if "running" in n}
    assert len(statistics) == 2
    assert same_bits(other.state_dict(), in_memory(base, tasks, "average") | statistics)


@pytest.mark.parametrize("method", ["magmax", "ties", "random-mix", "average"])
def test_the_files_of_a_callback_merge_to_what_it_installs(tmp_path, method):
    module = Plain()
    save_file(module.state_dict(), tmp_path / "base.safetensors")
    callback = MergeCallback(method, directory=tmp_path / "vectors")
    for task in range(3):
        fit(module, callback, task)
    callback.install(module)
    tasks = sorted((tmp_path / "vectors").iterdir())
    assert [path.name for path in tasks] == [f"task{i}.safetensors" for i in range(3)]
    merge_checkpoints(
        tmp_path / "base.safetensors", tasks, tmp_path / "m.safetensors", method=method
    )
    assert same_bits(load_file(tmp_path / "m.safetensors"), module.state_dict())
    other = Plain()
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("store", ["float32", "bf16", "int8", "int4", "int2"])
def test_stored_task_vectors_merge_to_what_they_load_as(tmp_path, base, tasks, store):
    paths, loaded = [], []
    for index, task in enumerate(tasks):
        paths.append(tmp_path / f"task{index}.safetensors")
        TaskVector.between(base, task).save(paths[-1], store)
        loaded.append(TaskVector.load(paths[-1]))
    base_file = write(tmp_path, "base", base, "safetensors")
    merge_checkpoints(base_file, paths, tmp_path / "out", method="ties")
    assert same_bits(read(tmp_path / "out"), in_memory(base, loaded, "ties"))
