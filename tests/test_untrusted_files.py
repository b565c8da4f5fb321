"""Foreign files that sampling, evaluation and training read: nothing in them is executed."""

import pickle

import numpy as np
import pytest
import torch
from tiny_sit import tiny_dinov2, tiny_vae
from transformers import GPT2Config, GPT2LMHeadModel

from common import UserError
from nanoGPT.model import GPT
from SIT.digits import load_digits_cnn
from SIT.encoders import load_encoder
from SIT.fid import ImagesOf
from SIT.latents import open_array
from SIT.published import open_published
from SIT.vae import load_vae


class Payload:
    """Runs code when it is unpickled: harmless, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def published_checkpoint(folder, payload):
    torch.save({"ema": payload}, folder / "SiT.pt")
    return lambda: open_published(folder / "SiT.pt")


def published_checkpoint_of_old_torch(folder, payload):
    (folder / "SiT.pt").write_bytes(pickle.dumps(payload))
    return lambda: open_published(folder / "SiT.pt")


def digits_network(folder, payload):
    torch.save({"width": 4, "z_dim": 4, "weights": payload}, folder / "judge.pt")
    return lambda: load_digits_cnn(folder / "judge.pt")


def samples(folder, payload):
    np.savez(folder / "a.npz", np.array([payload], dtype=object))
    return lambda: ImagesOf(folder / "a.npz")


def latent(folder, payload):
    np.save(folder / "a.npy", np.array([payload], dtype=object), allow_pickle=True)
    return lambda: open_array(folder / "a.npy")


def vae(folder, payload):
    tiny_vae().autoencoder.save_pretrained(folder, safe_serialization=False)
    torch.save({"weights": payload}, next(folder.glob("*.bin")))
    return lambda: load_vae(str(folder))


def dinov2(folder, payload):
    return replaced(tiny_dinov2(), folder, payload, lambda: load_encoder("dinov2-s", folder=folder, grid=4))


def gpt2(folder, payload):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11))
    return replaced(model, folder, payload, lambda: GPT.from_huggingface(str(folder)))


def replaced(model, folder, payload, load):
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": payload}, folder / "pytorch_model.bin")
    return load


READERS = [published_checkpoint, published_checkpoint_of_old_torch, digits_network, samples, latent, vae, dinov2, gpt2]


@pytest.mark.parametrize("poisoned", READERS)
def test_nothing_in_a_foreign_file_is_executed(poisoned, tmp_path):
    mark = tmp_path / "executed"
    load = poisoned(tmp_path, Payload(mark))
    with pytest.raises(UserError) as refusal:
        load()
    assert not mark.exists() and "\n" not in str(refusal.value)
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload is one
    assert mark.exists()
