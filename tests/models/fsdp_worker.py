"""Started by torchrun: weights sharded by FSDP2 against whole ones, in training and in drawing."""

import gc
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_layout import ARCHITECTURES, add_head_over_plain, build, groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from contrastive_align.data import GroupCollator
from contrastive_align.models.layout import choose_layout
from contrastive_align.models.logps import completion_logps, completion_objective
from contrastive_align.trainers.engines import calling_together, unsharded


def log_probs_and_gradients(mesh):
    batch = GroupCollator(0)(groups())
    for name in ("llama", "gemma2"):
        whole, sharded = build(*ARCHITECTURES[name]), build(*ARCHITECTURES[name])
        for model in (whole, sharded):
            add_head_over_plain(model)
            assert choose_layout(model, "shared", sharded=model is sharded) == "shared"
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        want, found = (completion_logps(model, batch, layout="shared").logps for model in (whole, sharded))
        assert torch.allclose(found, want, atol=1e-5), name
        want.sum().backward()
        found.sum().backward()
        for (parameter, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert torch.allclose(b.grad.full_tensor(), a.grad, rtol=1e-4, atol=1e-5), (name, parameter)


def a_trained_copy_of_the_head(mesh):
    """PEFT's copy, in a unit of its own as accelerate makes it: its gradient is the mean over the processes."""
    batches = [GroupCollator(0)(groups()[i : i + 1]) for i in range(dist.get_world_size())]
    whole, sharded = (build(*ARCHITECTURES["llama"]) for _ in range(2))
    for model in (whole, sharded):
        add_head_over_plain(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    models = []
    for model in (whole, sharded):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    fully_shard(sharded.lm_head, mesh=mesh, reshard_after_forward=False)
    fully_shard(models[1], mesh=mesh)
    for objective in (None, summed_log_probs):
        for model in models:
            model.zero_grad()
        losses = [loss_of(models[0], batch, objective) for batch in batches]
        (sum(losses) / len(losses)).backward()
        loss = loss_of(models[1], batches[dist.get_rank()], objective)
        assert torch.allclose(loss, losses[dist.get_rank()], atol=1e-4)
        loss.backward()
        want = whole.lm_head.modules_to_save["default"].weight.grad
        found = sharded.lm_head.modules_to_save["default"].weight.grad.full_tensor()
        assert want.abs().sum() > 0 and torch.allclose(found, want, rtol=1e-4, atol=1e-5)


def summed_log_probs(hidden, labels, weight, *_):
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).sum()


def loss_of(model, batch, objective):
    if objective is None:
        return completion_logps(model, batch).logps.sum()
    return completion_objective(model, batch, objective)


def drawing(mesh):
    """Each process draws another number of tokens: from gathered weights, and together layer by layer."""
    accelerator, ids = SimpleNamespace(device=torch.device("cpu")), torch.tensor([[3, 1, 4]])
    whole, sharded = (build(*ARCHITECTURES["llama"]) for _ in range(2))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for gathered in (True, False):
        with torch.no_grad(), unsharded(sharded) if gathered else calling_together(sharded, accelerator):
            for _ in range(1 + 2 * dist.get_rank()):
                assert gathered == (not isinstance(sharded.model.layers[0].mlp.up_proj.weight, DTensor))
                assert torch.allclose(sharded(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)
        assert isinstance(sharded.model.layers[0].mlp.up_proj.weight, DTensor)
    sharded(input_ids=ids).logits.sum().backward()  # layers are parted again after their forward, as they were
    assert isinstance(sharded.model.layers[0].mlp.up_proj.weight, DTensor)


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for check in (log_probs_and_gradients, a_trained_copy_of_the_head, drawing):
        check(mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # joins the process group's threads, which abort the process if they outlive it
