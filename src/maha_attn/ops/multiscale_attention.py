"""The attention of every scale, rotary embedding included: `scale_attention`, scale by scale."""

from collections.abc import Sequence

from torch import Tensor

from maha_attn.ops.backend import use_triton
from maha_attn.ops.rotary import rotate
from maha_attn.ops.scale_attention import scale_attention


def multiscale_attention(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    query_tables: Sequence[Tensor],
    key_table: Tensor,
    windows: Sequence[int | None],
    strides: Sequence[int],
    causal: bool,
    lengths: Sequence[Tensor] = (),
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """``O_s = softmax(R Q_s (R K_s)ᵀ/√K + mask) V_s`` of every scale, ``R`` the rotary embedding.

    Args:
        qs, ks, vs: Per scale as `scale_attention` takes them, not yet rotated.
        query_tables: Per scale ``[N_q, 2, K]`` of `maha_attn.ops.rotary.rotary_table`, or longer.
        key_table: The same for the keys of all scales, which stand at ``0, 1, …`` of their scale.
        windows: Per scale; None: full.
        strides: Queries to a key, per scale.
        causal: See `scale_attention`.
        lengths: None, or per scale ``[B]`` real keys of each row.
        backend: ``auto``, ``torch`` or ``triton``. By kernels, all scales are one operator.

    Returns:
        Outputs ``[B, H, N_s, K]``, and the rotated keys, which a cache holds (no gradient flows
        through them).
    """
    if use_triton(backend, *qs, *ks, *vs, width=qs[0].shape[-1]):
        from maha_attn.ops.triton.scale_attention import multiscale_attention as by_kernels

        return by_kernels(
            qs, ks, vs, windows=windows, strides=strides, causal=causal, lengths=lengths,
            query_tables=query_tables, key_table=key_table,
        )  # fmt: skip
    outputs, keys = [], []
    for s, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True)):
        q, k = (
            rotate(t.transpose(1, 2), table[: t.shape[2]], "torch").transpose(1, 2)
            for t, table in ((q, query_tables[s]), (k, key_table))
        )
        keys.append(k.detach())
        outputs.append(
            scale_attention(
                q,
                k,
                v,
                window=windows[s],
                causal=causal,
                stride=strides[s],
                lengths=lengths[s] if lengths else None,
                backend="torch",
            )
        )
    return outputs, keys
