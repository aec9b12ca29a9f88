"""Sort kernels into kinds by their names, and add up the time in which a GPU works."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lrnn.bench.kinds import KINDS, OTHER, by_kind, kernel_times, kind_of

REPOSITORY = Path(__file__).parents[2]
OURS = {
    "cast": "casts and copies",
    "chunk": "recurrence",
    "cross_entropy": "loss",
    "gate": "recurrence",
    "gated_rms_norm": "gated norm",
    "next_inputs": "short convolution",
    "next_state": "recurrence",
    "packed": "recurrence",
    "recurrent": "recurrence",
    "rms_norm": "RMS norm",
    "rotate": "attention",
    "segment": "recurrence",
    "selective_scan": "recurrence",
    "short_conv": "short convolution",
    "swiglu": "SwiGLU",
}
OTHERS = {
    "collectives": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)",
    ],
    "AdamW": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, "
        "(at::native::ADAM_MODE)1, false>, float const*, double, double, double, double, double, bool>",
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, int>, float, float, float>",
    ],
    "norm of the gradient": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<1>, at::native::(anonymous namespace)::LpNormFunctor<float, (at::native::NormType)1, "
        "float, 1, 1, 0>, float*, int>",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float, float, "
        "float>, unsigned int, float, 4, 4>>",
    ],
    "gated norm": ["layer_norm_gated_fwd_kernel", "layer_norm_gated_bwd_kernel_row"],
    "RMS norm": [
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>",
    ],
    "short convolution": [
        "causal_conv1d_fwd_kernel",
        "causal_conv1d_bwd_kernel_dwdb",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<1, c10::BFloat16, int>",
    ],
    "SwiGLU": [
        "swiglu_fwd_kernel",
        "swiglu_fwdbwd_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(at::"
        "TensorIteratorBase&)::{lambda()#1}, std::array<char*, 2ul>>",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::"
        "bfloat16_t>, false, true, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
    ],
    "recurrence": [
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
        "chunk_scaled_dot_kkt_fwd_kernel",
        "chunk_fwd_kernel_o",
        "chunk_bwd_kernel_dqkwg",
        "chunk_bwd_kernel_dv_local",
        "chunk_local_cumsum_scalar_kernel",
        "gdn_gate_chunk_cumsum_scalar_kernel",
        "gdn_gate_bwd_kernel",
        "fused_beta_sigmoid_fwd_kernel",
        "l2norm_fwd_kernel",
        "l2norm_bwd_kernel_row",
        "merge_16x16_to_64x64_inverse_kernel",
        "solve_tril_16x16_kernel",
        "recompute_w_u_fwd_kernel",
        "prepare_wy_repr_bwd_kernel",
        "chunk_gla_fwd_A_kernel_intra_sub_inter",
        "chunk_dplr_fwd_kernel_h",
        "fused_recurrent_fwd_kernel",
    ],
    "loss": [
        "cross_entropy_fwd_kernel",
        "logsumexp_fwd_kernel",
        "elementwise_mul_kernel",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
    ],
    "products": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_TNT",
        "nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x128_cublas",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
        "cute::tuple<int, int, int, int>, cutlass::gemm::collective::CollectiveMma<cutlass::float_e4m3_t>>>>",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
    ],
    "embedding": [
        "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>",
        "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float, float, long>",
        "void at::native::(anonymous namespace)::compute_grad_weight<float, long>",
        "void at::native::(anonymous namespace)::sum_and_scatter<float, long>",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::Policy900, long, long>",
    ],
    "casts and copies": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::"
        "TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul>>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
        "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::OpaqueType<2u>>",
    ],
    "elementwise and sums": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, at::native::"
        "binary_internal::MulFunctor<float>>, std::array<char*, 3ul>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::"
        "native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}>>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<2>, at::native::(anonymous namespace)::BinaryOpScalarTensorFunctor<float, 1, 1, 0>>",
        "triton_poi_fused_add_mul_3",
    ],
    OTHER: ["a_kernel_of_tomorrow"],
}


def our_kernels() -> set[str]:
    """Return the names of the kernels in the source."""
    files = [*(REPOSITORY / "kernels").rglob("*.py"), *(REPOSITORY / "pretrain").rglob("*.py")]
    return {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}


def test_our_kernels():
    """Every kernel in the source is of the kind that the beginning of its name says."""
    names = our_kernels()
    assert len(names) > 20
    for name in names:
        stem = max((stem for stem in OURS if name.startswith(f"{stem}_")), key=len)
        assert kind_of(name) == OURS[stem], name


@pytest.mark.parametrize("kind", OTHERS)
def test_kernels_of_others(kind):
    assert {name: kind_of(name) for name in OTHERS[kind]} == dict.fromkeys(OTHERS[kind], kind)


def test_every_kind_is_tested():
    assert set(OTHERS) == set(KINDS)


def event(name, start, duration, category="kernel", stream=7):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": stream, "pid": 0}


def test_kernels_that_run_at_once_count_once():
    """A collective counts only where nothing else runs. Marked ranges and the host do not count."""
    events = [
        event("nvjet_a", 1000.0, 100.0),
        event("ncclDevKernel_AllReduce", 1050.0, 200.0, stream=9),
        event("rms_norm_forward_kernel", 1080.0, 60.0, stream=8),
        event("Memset (Device)", 2000.0, 10.0, category="gpu_memset"),
        event("Memcpy HtoD", 2010.0, 5.0, category="gpu_memcpy"),
        event("Optimizer.step#AdamW.step", 900.0, 5000.0, category="gpu_user_annotation"),
        event("cudaLaunchKernel", 990.0, 5.0, category="cuda_runtime"),
        event("aten::mm", 980.0, 50.0, category="cpu_op"),
        {"ph": "s", "cat": "kernel", "name": "a flow", "ts": 1.0, "dur": 1.0},
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    times = kernel_times(events)
    expected = {"nvjet_a": 100, "rms_norm_forward_kernel": 40, "ncclDevKernel_AllReduce": 110}
    expected |= {"Memset (Device)": 10, "Memcpy HtoD": 5}
    assert {name: round(1e3 * time, 6) for name, time in times.items()} == expected
    kinds = by_kind(times)
    assert round(kinds["casts and copies"], 6) == 0.015 and round(kinds["collectives"], 6) == 0.11


def test_kinds_sum_to_the_time_in_which_anything_runs():
    """The time is counted again microsecond by microsecond."""
    random = np.random.default_rng(0)
    names = [name for names in OTHERS.values() for name in names]
    events, runs = [], np.zeros(4000, dtype=bool)
    for _ in range(300):
        start, duration = int(random.integers(0, 3500)), int(random.integers(0, 40))
        events.append(event(str(random.choice(names)), start, duration, stream=int(random.integers(3))))
        runs[start : start + duration] = True
    kinds = by_kind(kernel_times(events))
    assert isinstance(kinds, Counter) and 0.2 < runs.mean() < 0.9
    assert kinds.total() == pytest.approx(runs.sum() / 1e3, rel=1e-9)


def test_no_events():
    assert kernel_times([]).total() == 0
