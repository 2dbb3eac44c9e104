"""Started by torchrun: log-probs and gradients of the shared layout, weights sharded by FSDP2 against whole."""

import gc

import torch
import torch.distributed as dist
from test_layout import ARCHITECTURES, add_head_over_plain, build, groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from contrastive_align.data import GroupCollator
from contrastive_align.models.layout import choose_layout
from contrastive_align.models.logps import completion_logps


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # joins the process group's threads, which abort the process if they outlive it
