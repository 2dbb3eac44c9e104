"""Stand-ins for what TRL calls of vLLM: its own client of a server, and the engine beside the trainer.

Both hold a model of their own, in which the weights come that they are handed, by name; they draw from that model. What
they draw depends on the weights, the prompt, and how often it was asked for since the weights came.
"""

from collections import Counter
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from contrastive_align.sampling.decode import draw, seed_of


class Engine:
    """A model on a server: ``path`` is what it was started with."""

    def __init__(self, path, heeds_bias=True):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.parameters = dict(self.model.named_parameters())
        self.heeds_bias = heeds_bias
        self.asked, self.history, self.calls = Counter(), [], []

    def load(self, name, tensor):
        own = self.parameters[name]  # vLLM, too, knows the names of the base alone
        assert own.shape == tensor.shape, name
        with torch.no_grad():
            own.copy_(tensor)

    def draw(self, prompts, n, params):
        self.calls.append((prompts, n, params))
        seeds = []
        for prompt in prompts:
            self.asked[str(prompt)] += 1
            seeds.append(seed_of(prompt, self.asked[str(prompt)]))
        bias = params.get("logit_bias", {}) if self.heeds_bias else {}
        assert set(bias.values()) <= {-100.0}
        return draw(
            self.model,
            prompts,
            per_prompt=n,
            max_new_tokens=params["max_tokens"],
            eos_token_ids=params.get("stop_token_ids", [self.model.config.eos_token_id]),
            pad_token_id=0,
            seeds=seeds,
            temperature=params["temperature"],
            top_p=params["top_p"],
            suppress_ids=list(bias),
        ).completion_ids


class Client:
    """``trl.generation.vllm_client.VLLMClient``, as far as TRL's trainers call it."""

    engine: Engine

    def __init__(self, base_url=None, host="0.0.0.0", server_port=8000, group_port=51216, connection_timeout=0.0):
        self.engine.history.append(("connect", base_url, group_port, connection_timeout))

    def init_communicator(self, device=0):
        self.engine.history.append("communicator")

    def update_named_params(self, metadata, named_params):
        for (name, dtype, shape), (found, tensor) in zip(metadata, named_params, strict=True):
            assert (name, dtype, shape) == (found, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            self.engine.load(name, tensor)
        self.engine.history.append("weights")

    def reset_prefix_cache(self):
        self.engine.asked.clear()
        self.engine.history.append("reset")

    def generate(
        self, prompts, features=None, n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
        max_tokens=16, logprobs=0, structured_outputs_regex=None, generation_kwargs=None,
    ):  # fmt: skip
        assert features is None and structured_outputs_regex is None
        params = {
            "repetition_penalty": repetition_penalty, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "min_p": min_p, "max_tokens": max_tokens, "logprobs": logprobs, **(generation_kwargs or {}),
        }  # fmt: skip
        self.engine.history.append("generate")
        ids = [ids for group in self.engine.draw(prompts, n, params) for ids in group]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None, "logprob_token_ids": None}


class LLM:
    """``vllm.LLM``, as far as TRL's trainers call it."""

    engine: Engine

    def __init__(self, **options):
        self.options = options
        self.engine.history.append("start")
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def _load(self, weights):
        for name, tensor in weights:
            self.engine.load(name, tensor)

    def reset_prefix_cache(self):
        self.engine.asked.clear()
        self.engine.history.append("weights")

    def sleep(self, level):
        with torch.no_grad():
            for parameter in self.engine.parameters.values():
                parameter.fill_(torch.nan)
        self.engine.history.append("sleep")

    def wake_up(self, tags):
        self.engine.history.append(f"wake {tags[0]}")

    def generate(self, prompts, sampling_params, use_tqdm):
        params = dict(vars(sampling_params))
        self.engine.history.append("generate")
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        drawn = self.engine.draw(prompts, params.pop("n"), params)
        one = [[SimpleNamespace(token_ids=ids, logprobs=None) for ids in group] for group in drawn]
        return [SimpleNamespace(prompt_token_ids=p, outputs=o) for p, o in zip(prompts, one, strict=True)]


def install(path, set_attribute=setattr, **options):
    """Let TRL find these in the places of vLLM's; ``set_attribute`` may be pytest's ``monkeypatch.setattr``."""
    engine = Engine(path, **options)
    places = {
        "is_vllm_available": lambda: True,
        "VLLMClient": type("Client", (Client,), {"engine": engine}),
        "LLM": type("LLM", (LLM,), {"engine": engine}),
        "SamplingParams": SimpleNamespace,
    }
    for name, stand_in in places.items():
        set_attribute(vllm_generation, name, stand_in)
    return engine
