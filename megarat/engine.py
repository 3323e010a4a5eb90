"""The only door to DeepSpeed: builds its configuration, wraps a model, makes one optimizer update, moves ZeRO state in and out.

What DeepSpeed does here: mixed precision with fp32 masters, ZeRO 1/2/3, gradient accumulation and reduction, clipping, the step of
AdamW. What it does not: schedule, data, checkpoints, logs, guards.

    engine = Engine(model, config, mesh)
    update = engine.update(micro_batches, patterns, lr)      # forward and backward of every micro-batch, clip, AdamW

Facts about DeepSpeed 0.19 that shaped this file:
- ZeRO 1 with bf16 and fp32 accumulation is its ``BF16_Optimizer``; the other cases are ``DeepSpeedZeroOptimizer`` (1, 2) and
  ``DeepSpeedZeroOptimizer_Stage3``. Each keeps its gradients elsewhere, hence ``_gradient_norm`` and ``_drop_gradients``.
- Older versions assert on a non-finite norm, newer ones skip silently: the norm is looked at here, before ``step`` is called.
- On CPU ``init_distributed`` compiles a C++ extension that training never uses (needs ninja and a compiler): switched off.
- Adam's moments exist only after a first step, and ZeRO links them to the parameters then: ``_ensure_moments`` makes both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megarat.config import Config, OptimConfig
from megarat.cuda_graphs import RecordedMicroBatches, Recorder
from megarat.errors import UserError
from megarat.mesh import ENDS, MODEL, REPLICAS, TENSOR, Mesh
from megarat.model import names
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Patterns
from megarat.ops import accumulate_, fp8_missing
from megarat.ops.summed_linear import add_outer_, apex_add_outer_, apex_missing, summed_linear
from megarat.parallel.fragments import Fragments, cut, gather

# Inputs and labels, and the document of each token where documents are kept apart; (b, T) int64 each; label -100 is ignored.
MicroBatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
NamedState = dict[str, dict[str, Tensor]]  # kind -> logical name -> fp32 tensor

MASTER, FIRST_MOMENT, SECOND_MOMENT = STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")

_LAZY_MODULES = (  # that DeepSpeed imports when an engine is built
    "torch._dynamo",
    "torch.utils.serialization",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)
_BUCKET_ELEMENTS = 500_000_000  # gradients reduced, or weights gathered, at a time (DeepSpeed's own default)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Update(NamedTuple):
    """What one optimizer update reports."""

    loss: float  # mean over micro-batches and ranks
    grad_norm: float  # global L2 norm before clipping
    finite: bool  # False: loss or norm was not finite, and no weight was touched
    refused: bool = False  # by the caller, who had seen loss and norm: no weight was touched either

    @property
    def made(self) -> bool:
        """Whether the weights were updated."""
        return self.finite and not self.refused


class Engine:
    """A model under training."""

    def __init__(self, model: RATPlusLM, config: Config, mesh: Mesh) -> None:
        """Wrap ``model``, whose fp32 parameters become the masters. The model is cast and moved in place."""
        self.mesh = mesh
        self.zero = config.parallel.zero
        self.precision = resolve_precision(config.train.precision, mesh.device)
        self.micro_batches = config.train.global_batch // (config.train.micro_batch * mesh.shape.data)
        if config.train.fp8 and mesh.device.type == "cuda" and (reason := fp8_missing(mesh.device)):
            raise UserError(f"train.fp8: {reason}; set train.fp8=false")
        deepspeed = _import_deepspeed(mesh.device)
        self._stages = mesh.shape.pipeline
        self._model = model
        deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
        initial = {name: parameter.data for name, parameter in model.named_parameters()}
        self._pieces = {
            name: names.pieces(name, tuple(tensor.shape), mesh.place.tensor, mesh.shape.tensor)
            for name, tensor in initial.items()
        }
        optimizer = make_adamw(_parameter_groups(model, config.optim), config.optim, mesh.device)
        parameters = sum(tensor.numel() for tensor in initial.values())
        settings = _deepspeed_config(config, self.precision, self.micro_batches, parameters)
        recording = torch.cuda.Stream(mesh.device) if config.train.cuda_graphs and mesh.device.type == "cuda" else None
        # BF16_Optimizer prints its memory use; its hooks make the nodes that take the gradients, on the stream of the recordings
        with contextlib.redirect_stdout(io.StringIO()), torch.cuda.stream(recording):  # type: ignore[arg-type]
            wrapped, unit = (model, _ModelParallelUnit(mesh)) if self._stages == 1 else (_pipeline_module(model, mesh), None)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=wrapped, optimizer=optimizer, config=settings, mpu=unit
            )
        if self._stages > 1:
            _leave_out_the_step(self._engine)
        self._adamw = optimizer
        if self._has_bf16_optimizer:
            self._optimizer._update_hp_grad = functools.partial(_add_gradient, self._optimizer)
        if config.train.weight_gradients != "separate":
            self._sum_in_products(config.train.weight_gradients)
        if recording is not None:
            torch.cuda.current_stream().wait_stream(recording)
        self._recorded = self._recorded_micro_batches(recording) if config.train.cuda_graphs else None
        if self.precision == "bf16":  # masters start from the fp32 initialisation, not from its bf16 rounding
            for name, parameter in self.model.named_parameters():
                flat, first = self._own_part(parameter, MASTER)
                flat.copy_(initial[name].flatten()[first : first + flat.numel()])
            self._refresh_weights()

    @property
    def model(self) -> RATPlusLM:
        """The wrapped model."""
        return self._model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's weights."""
        return _DTYPES[self.precision]

    # ---- one update -------------------------------------------------------------------------------------------------------

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        patterns: Patterns,
        lr: float,
        accept: Callable[[float, float], bool] | None = None,
    ) -> Update:
        """One optimizer update: accumulate gradients over ``micro_batches``, clip, AdamW with learning rate ``lr``.

        The loss is the plain mean over micro-batches and ranks. The gradients are dropped instead when it or their norm is not finite, or
        when ``accept(loss, norm)`` refuses; it must decide alike on all ranks, which give it the same numbers.
        """
        (made,) = self.summed_update(micro_batches, (patterns,), lr, (accept,))
        return made

    def summed_update(
        self,
        micro_batches: Sequence[MicroBatch],
        passes: Sequence[Patterns],
        lr: float,
        accepts: Sequence[Callable[[float, float], bool] | None],
    ) -> list[Update]:
        """One update by the sum of the losses of several passes over the same micro-batches, each under its own patterns.

        Reported by pass, with its loss and the one norm of all gradients; made unless one of the passes is bad. See ``update``.
        """
        if len(micro_batches) != self.micro_batches:
            raise ValueError(f"{len(micro_batches)} micro-batches given; the engine was built for {self.micro_batches}")
        *losses, norm = self._decide(self._accumulate(micro_batches, passes))
        finite = all(map(math.isfinite, (*losses, norm)))
        refused = finite and not all(accept is None or accept(loss, norm) for accept, loss in zip(accepts, losses, strict=True))
        if finite and not refused:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._step()
        else:
            self._drop_gradients()
        return [Update(loss, norm, finite, refused) for loss in losses]

    def _decide(self, losses: Tensor) -> list[float]:
        """Losses and gradient norm as numbers, equal on all ranks whatever their last bits. The one wait for the device in an update."""
        figures = torch.cat([losses, self._gradient_norm().view(1)])
        torch.distributed.broadcast(figures, 0)
        return cast("list[float]", figures.tolist())

    def _step(self) -> None:
        if self._stages == 1:
            self._engine.step()
        else:
            self._engine._exec_optimizer_step()

    def _accumulate(self, micro_batches: Sequence[MicroBatch], passes: Sequence[Patterns]) -> Tensor:
        """Gradients of all micro-batches and passes, summed over ranks; returns each pass' mean loss over micro-batches and data ranks."""
        if self._stages > 1:
            (patterns,) = passes  # the schedule of a pipeline ends with the reduction of gradients
            total = self._through_pipeline(micro_batches, patterns).view(1)
        else:
            total = self._one_by_one(micro_batches, passes)
        torch.distributed.all_reduce(total)
        return total / (len(micro_batches) * self.mesh.world_size // self._stages)

    def _through_pipeline(self, micro_batches: Sequence[MicroBatch], patterns: Patterns) -> Tensor:
        """Forward and backward in DeepSpeed's 1F1B order, without the step; the loss is the last stage's, 0 on the others."""
        engine = self._engine
        on_device = self._on_device(micro_batches)
        engine.module.stage.begin(patterns, [labels_BT for _, labels_BT, *_ in on_device])
        engine.set_dataiterator(((ids_BT, *documents), labels_BT) for ids_BT, labels_BT, *documents in on_device)
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(engine._train_schedule())
        return torch.zeros((), device=self.mesh.device) if engine.total_loss is None else engine.total_loss.float()

    def _one_by_one(self, micro_batches: Sequence[MicroBatch], passes: Sequence[Patterns]) -> Tensor:
        total = torch.zeros(len(passes), device=self.mesh.device)
        on_device = self._on_device(micro_batches)
        for number, patterns in enumerate(passes):
            for index, micro_batch in enumerate(on_device):
                is_last = number == len(passes) - 1 and index == len(on_device) - 1
                total[number] += self._add_micro_batch(micro_batch, patterns, is_last)
        return total

    def _add_micro_batch(self, micro_batch: Sequence[Tensor], patterns: Patterns, is_last: bool) -> Tensor:
        """Adds a micro-batch's gradients to the sums, which the last one of an update reduces over replicas; its loss in fp32."""
        if self._recorded is not None and not is_last and (loss := self._recorded.loss(micro_batch, patterns)) is not None:
            return loss.float()
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss = self._forward(micro_batch, patterns)
        self._backward(loss)
        if self._recorded is not None:
            self._recorded.met(patterns)
        return loss.detach().float()

    def _recorded_micro_batches(self, stream: torch.cuda.Stream | None) -> RecordedMicroBatches:
        if stream is None or not self._has_bf16_optimizer:
            raise UserError(
                f"train.cuda_graphs in {self.precision} on {self.mesh.device.type}: needs a GPU and bf16; set it to false"
            )
        return RecordedMicroBatches(self._model, self.micro_batches, Recorder(stream))

    def _sum_in_products(self, how: str) -> None:
        """Let the layers' products add weight gradients to DeepSpeed's fp32 sums, which stay where they are for good."""
        if not self._has_bf16_optimizer:
            raise UserError(
                f"train.weight_gradients = {how} in {self.precision}: needs bf16; set train.weight_gradients=separate"
            )
        if how == "apex" and (reason := apex_missing()):
            raise UserError(f"train.weight_gradients = apex: {reason}; set train.weight_gradients=product")
        optimizer = self._optimizer
        places = {id(weight): (g, i) for g, group in enumerate(optimizer.bf16_groups) for i, weight in enumerate(group)}

        def note(group: int, index: int) -> None:
            optimizer.fp32_groups_has_gradients[group][index] = True

        for linear in (linear for block in self.model.blocks for linear in block.linears):
            group, index = places[id(linear.weight)]
            total_FC = optimizer.fp32_groups_gradients[group][index].view(linear.weight.shape)
            linear.product = functools.partial(
                summed_linear,
                total_FC=total_FC,
                note=functools.partial(note, group, index),
                add_outer=apex_add_outer_ if how == "apex" else add_outer_,
            )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], patterns: Patterns) -> tuple[float, int]:
        """Summed loss (nats) and number of scored tokens of the data ranks' micro-batches, on every rank; nothing is trained.

        Any number of micro-batches, the same on every rank, each of the shape that is trained on.
        """
        on_device = self._on_device(micro_batches)
        self._engine.eval()
        if self._stages > 1:
            losses = self._evaluate_through_pipeline(on_device, patterns)
        else:
            losses = [self._forward(micro_batch, patterns) for micro_batch in on_device]
        self._engine.train()
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for loss, (_, labels_BT, *_) in zip(losses, on_device, strict=False):  # stages before the last one have no losses
            count = (labels_BT != -100).sum()
            total += torch.stack([loss.double() * count, count.double()])
        torch.distributed.all_reduce(total)
        sharing = self.mesh.shape.tensor * self.mesh.shape.context  # ranks that report the same tokens
        nats, tokens = (total / sharing).tolist()
        return nats, round(tokens)

    def _evaluate_through_pipeline(self, micro_batches: Sequence[Sequence[Tensor]], patterns: Patterns) -> list[Tensor]:
        """Mean losses on the last stage, none on the others."""
        engine = self._engine
        engine.module.stage.begin(patterns, [labels_BT for _, labels_BT, *_ in micro_batches])
        engine.set_dataiterator(((ids_BT, *documents), labels_BT) for ids_BT, labels_BT, *documents in micro_batches)
        engine._compute_loss = True
        engine._exec_schedule(engine._inference_schedule(len(micro_batches)))
        return list(engine.fwd_outputs)

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> list[list[Tensor]]:
        """All micro-batches, copied before any arithmetic is queued: a copy from pageable memory waits for what is queued before it."""
        return [[tensor.to(self.mesh.device) for tensor in micro_batch] for micro_batch in micro_batches]

    def _forward(self, micro_batch: Sequence[Tensor], patterns: Patterns) -> Tensor:
        ids_BT, labels_BT, *documents = micro_batch
        loss: Tensor = self._engine(
            ids_BT, patterns=patterns, labels_BT=labels_BT, document_ids_BT=documents[0] if documents else None
        )
        return loss

    def _backward(self, loss: Tensor) -> None:
        """Adds to the gradients, divided by the number of micro-batches; after the last micro-batch reduces them over replicas."""
        self._engine.backward(loss)

    def _gradient_norm(self) -> Tensor:
        """Global L2 norm of the accumulated gradients on every rank; inf when an element is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        if self.zero == 3:
            norm = combine_grad_norm_groups(self._optimizer._get_norm_groups())
        elif self._has_bf16_optimizer:
            gradients, _ = self._optimizer.get_grads_for_norm()
            norm = get_global_norm_of_tensors(gradients, mpu=self._optimizer.mpu)
        else:
            norm = self._optimizer.scaled_global_norm()
        norm = norm.to(self.mesh.device, torch.float32)
        return torch.where(norm >= 0, norm, math.inf)  # DeepSpeed writes -1 for a norm that is not finite

    def _drop_gradients(self) -> None:
        """Forget the accumulated gradients, as ``step`` would have after using them."""
        optimizer = self._optimizer
        optimizer.zero_grad()
        if self.zero == 3:
            optimizer.averaged_gradients = {}
        elif not self._has_bf16_optimizer:
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = -1

    @property
    def _has_bf16_optimizer(self) -> bool:
        return self.zero == 1 and self.precision == "bf16"

    # ---- state in and out -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Fragments]]:
        """This rank's part of the fp32 masters and both Adam moments, by kind and logical name; the moments are zero before a first step.

        All boxes are the optimizer's own memory: after writing into them, call ``adopt``.
        """
        self._ensure_moments()
        state: dict[str, dict[str, Fragments]] = {kind: {} for kind in STATE_KINDS}
        for name, parameter in self.model.named_parameters():
            for kind in STATE_KINDS:
                flat, first = self._own_part(parameter, kind)
                state[kind] |= cut(flat, first, self._pieces[name], self._writes(parameter))
        return state

    def adopt(self, steps: int) -> None:
        """Go on from what was written into ``state``, after ``steps`` AdamW steps: exactly as the engine that it came from."""
        self._ensure_moments()
        self._set_step_count(steps)
        self._refresh_weights()

    def named_state(self) -> tuple[NamedState, int]:
        """The whole of ``state``, gathered on every rank's host, and the number of AdamW steps taken: for small models."""
        whole = {kind: gather(held, torch.distributed.group.WORLD) for kind, held in self.state().items()}
        return whole, self.steps

    def load_named_state(self, state: NamedState, steps: int) -> None:
        """The reverse of ``named_state``: the next update equals the one of the engine that gave the state, bit for bit on a CPU."""
        for kind, held in self.state().items():
            for name, fragments in held.items():
                fragments.fill(state[kind][name])
        self.adopt(steps)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set masters and model from tensors by logical name, of any float dtype; the optimizer stays fresh."""
        for name, fragments in self.state()[MASTER].items():
            fragments.fill(weights[name])
        self.adopt(0)

    def gradients(self, micro_batches: Sequence[MicroBatch], patterns: Patterns) -> dict[str, Tensor]:
        """Gradients of the mean loss over micro-batches and ranks, by logical name, whole on every rank's host; nothing is updated."""
        from deepspeed.utils import safe_get_full_grad

        self._accumulate(micro_batches, (patterns,))
        parts: dict[str, Fragments] = {}
        for name, parameter in self.model.named_parameters():
            parts |= cut(safe_get_full_grad(parameter).flatten(), 0, self._pieces[name], self._writes(parameter))
        self._drop_gradients()
        return gather(parts, torch.distributed.group.WORLD)

    def _writes(self, parameter: nn.Parameter) -> bool:
        """Whether this rank writes what it holds of a parameter that other model ranks hold as well."""
        replicated = not getattr(parameter, "tensor_model_parallel", False) and self.mesh.place.tensor > 0
        return not (replicated or getattr(parameter, "ds_pipe_replicated", False))

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical tensors of this rank's layers and their shapes."""
        return {piece.name: piece.whole for pieces in self._pieces.values() for piece in pieces}

    def _own_part(self, parameter: nn.Parameter, kind: str) -> tuple[Tensor, int]:
        """The elements of a flattened parameter whose ``kind`` ZeRO keeps on this rank, and the number of the first one."""
        key = None if kind == MASTER else kind
        if self.zero == 3:
            part, _ = self._optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
            first = part.numel() * self.mesh.group(REPLICAS).rank()
            return part.detach()[: max(0, parameter.ds_numel - first)], first  # type: ignore[attr-defined]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0, device=self.mesh.device), 0
        return mapping.get_hp_fragment(key).detach(), mapping.lp_fragment_address.start

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Copy the masters into the model's weights, as the end of a step does."""
        optimizer = self._optimizer
        if self.zero < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _flat_masters(self) -> list[Tensor]:
        """The flat fp32 tensors AdamW steps on."""
        if self.zero == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        if self._has_bf16_optimizer:
            return list(self._optimizer.fp32_groups_flat_partition)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _ensure_moments(self) -> None:
        """Create AdamW's zero moments, which it would create in its first step, and let ZeRO link them to the parameters."""
        fused = self._adamw.defaults.get("fused", False)
        for master in self._flat_masters():
            state = self._adamw.state[master]
            if FIRST_MOMENT not in state:
                state[FIRST_MOMENT], state[SECOND_MOMENT] = torch.zeros_like(master), torch.zeros_like(master)
                if not _keeps_step_in_groups(self._adamw):
                    state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
        if self.zero < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def steps(self) -> int:
        """AdamW steps taken."""
        self._ensure_moments()
        if _keeps_step_in_groups(self._adamw):
            return int(self._adamw.param_groups[0].get("step", 0))
        return int(self._adamw.state[self._flat_masters()[0]]["step"].item())

    def _set_step_count(self, steps: int) -> None:
        if _keeps_step_in_groups(self._adamw):
            for group in self._adamw.param_groups:
                group["step"] = steps
            return
        for master in self._flat_masters():
            self._adamw.state[master]["step"].fill_(steps)

    def memory_gb(self) -> float:
        """Peak memory of this rank so far in 10^9 bytes: the allocator's on a GPU, resident memory on a CPU."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB


def resolve_precision(precision: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 on GPUs and on CPUs with bf16 matrix units."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" or torch.cpu._is_amx_tile_supported() else "fp32"


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quiet, and without its run-time C++ build for CPU inference."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    for message in (r"`torch.distributed.\w+` is deprecated", r"barrier\(\): using the device under current context"):
        warnings.filterwarnings("ignore", message)  # of calls that DeepSpeed makes
    return deepspeed


def warm_up() -> None:
    """Import everything an engine on CPUs needs, so that processes forked from this one have it."""
    _import_deepspeed(torch.device("cpu"))
    for module in _LAZY_MODULES:
        importlib.import_module(module)


def _pipeline_module(model: RATPlusLM, mesh: Mesh) -> Any:
    """``model``, a stage, as DeepSpeed's ``PipelineModule`` of as many layers as there are stages."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class Stages(PipelineModule):  # type: ignore[misc]
        def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
            """The embedding of the first stage and its copy on the last one: DeepSpeed adds up their gradients."""
            return [(model.embedding.weight, mesh.group(ENDS))] if model.is_first or model.is_last else []

    stage = _Stage(model)
    shape = mesh.shape
    with contextlib.redirect_stdout(io.StringIO()):
        module = Stages(
            layers=[stage if index == mesh.place.pipeline else torch.nn.Identity() for index in range(shape.pipeline)],
            topology=PipeModelDataParallelTopology(num_pp=shape.pipeline, num_mp=shape.tensor, num_dp=shape.data),
            partition_method="uniform",
        )
    module.stage = stage
    if model.is_last:
        model.embedding.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]  # counted once in the norm
    return module


def _leave_out_the_step(pipeline_engine: Any) -> None:
    """Let a schedule end after the gradients are reduced: whether to step is decided here, when their norm is known."""
    from deepspeed.runtime.pipe.schedule import OptimizerStep

    def do_nothing(engine: Any) -> None:
        pass

    pipeline_engine._INSTRUCTION_MAP = pipeline_engine._INSTRUCTION_MAP | {OptimizerStep: do_nothing}


@torch.no_grad()
def _add_gradient(optimizer: Any, weight: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
    """Add a weight's bf16 gradient to its fp32 sum in one pass; DeepSpeed's own method makes an fp32 copy of it first."""
    if weight.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    accumulate_(total, weight.grad.contiguous())
    weight._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed looks for the gradients of tied weights
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        weight.grad.zero_()


class _Stage(nn.Module):
    """One stage: (ids or residual stream, and perhaps documents) -> the same for the next stage, or the loss.

    The pattern does not travel with the activations; it is set on every rank before a batch. The loss is taken here rather than by
    DeepSpeed's ``loss_fn``: its BF16_Optimizer loses gradients of parameters that are used outside of the module (the tied head).
    """

    def __init__(self, model: RATPlusLM) -> None:
        super().__init__()
        self.model = model

    def begin(self, patterns: Patterns, labels: Sequence[Tensor]) -> None:
        """Take the micro-batches that follow under ``patterns``; the last stage meets their ``labels`` in this order."""
        self.patterns, self.labels = patterns, iter(labels)

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        first, *documents = inputs if isinstance(inputs, tuple) else (inputs,)
        x_BTC = self.model.embed(first) if self.model.is_first else first
        x_BTC = self.model.run_stage(x_BTC, self.patterns, documents[0] if documents else None)
        if self.model.is_last:
            return self.model.loss(x_BTC, next(self.labels))
        return (x_BTC, *documents) if documents else x_BTC


class _ModelParallelUnit:
    """How DeepSpeed asks for the mesh: its model-parallel ranks hold one set of weights, its data-parallel ranks are replicas."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        return self._mesh.group(MODEL)

    def get_model_parallel_rank(self) -> int:
        return self._mesh.group(MODEL).rank()

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.group(MODEL).size()

    def get_tensor_model_parallel_group(self) -> Any:
        return self._mesh.group(TENSOR)

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.group(TENSOR).rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.group(TENSOR).size()

    def get_data_parallel_group(self) -> Any:
        return self._mesh.group(REPLICAS)

    def get_data_parallel_rank(self) -> int:
        return self._mesh.group(REPLICAS).rank()

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.group(REPLICAS).size()


def _deepspeed_config(config: Config, precision: str, micro_batches: int, parameters: int) -> dict[str, Any]:
    bucket = min(parameters, _BUCKET_ELEMENTS)  # ZeRO allocates a whole bucket however small the model is
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.parallel.zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": config.parallel.pipeline == 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        # ZeRO 1 adds up the accumulated gradients of all ranks once an update, in fp32 like the accumulation (DeepSpeed's default would
        # round them to bf16 on the way); ZeRO 2 and 3 send the gradients of each micro-batch as the model made them.
        "communication_data_type": "fp32" if config.parallel.zero == 1 else None,
        "steps_per_print": None,
        # DeepSpeed's throughput timer would wait for the GPU before every forward, which no CUDA graph can hold either
        "timers": {"throughput": {"enabled": False}},
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },  # each tensor rank hands its stream to its own next stage
    }


def _parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups: what ``optim.no_decay`` names gets no weight decay."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_norm, is_embedding = parameter.dim() == 1, name.startswith("embedding.")
        without = optim.no_decay != "nothing" and (is_norm or (is_embedding and optim.no_decay == "norms_and_embedding"))
        (exempt if without else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": optim.weight_decay}]
    return groups + ([{"params": exempt, "weight_decay": 0.0}] if exempt else [])


def make_adamw(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW: torch's (fused on a GPU), or apex's FusedAdam."""
    settings: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.implementation == "apex":
        if device.type != "cuda" or (fused_adam := apex_fused_adam()) is None:
            raise UserError(
                "optim.implementation = apex: needs a GPU and NVIDIA's apex with its CUDA extensions; set it to torch"
            )
        return fused_adam(groups, adam_w_mode=True, **settings)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **settings)


def apex_fused_adam() -> Any:
    """NVIDIA's FusedAdam, or None. PyPI's package of the name apex is another project and has no ``optimizers``."""
    try:
        importlib.import_module("amp_C")  # NVIDIA's CUDA extension, without which FusedAdam cannot step
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None


def _keeps_step_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step count is kept per parameter group (apex) instead of per tensor (torch)."""
    return not isinstance(optimizer, torch.optim.AdamW)
