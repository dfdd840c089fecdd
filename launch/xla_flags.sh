#!/usr/bin/env bash
# Prints the compiler's flags for each kind of chip; no other file has any.
usage() {
  cat <<'TEXT'
eval "$(bash launch/xla_flags.sh KIND)"      # KIND: v4, v5e, v5p, v6e, gpu, none, or auto to look at the machine

Prints `export` lines. Flags that the user has already set are kept and come last, so that they win.
TEXT
}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

options "" "" "$@"
[ ${#REST[@]} -eq 1 ] || { usage >&2; die "give one KIND."; }
kind=${REST[0]}

# The kind of chip in this machine. TPU_ACCELERATOR_TYPE is set in GKE, the metadata server answers on TPU VMs.
detect() {
  local type=${TPU_ACCELERATOR_TYPE:-} address=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  if [ -z "$type" ] && { [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; } && command -v curl >/dev/null; then
    type=$(curl -sf --max-time 3 -H 'Metadata-Flavor: Google' $address/accelerator-type || true)
  fi
  case $type in
  v4-*) echo v4 ;;
  v5litepod-* | v5e-*) echo v5e ;;
  v5p-*) echo v5p ;;
  v6e-*) echo v6e ;;
  *) if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; else echo none; fi ;;
  esac
}
[ "$kind" != auto ] || kind=$(detect)

tpu=() xla=() variables=()
case $kind in
v4 | v5e | v5p)
  # Nothing: libtpu's defaults already overlap a layer's gathers with the matrix products of the one before. The list of
  # "async collective fusion" flags that is often copied is refused by libtpu 0.0.51 on v5p and v6e ("might lead to incorrect
  # results, hang") and gives the same program, byte for byte, on v5e; so do the data-parallel ones on a single slice.
  ;;
v6e)
  # Fusions and kernels may use 96 of the 128 MiB of vector memory instead of the default share: larger tiles, so that
  # weights are read from HBM less often. Google's training recipes for this chip set it for dense models.
  tpu+=(--xla_tpu_scoped_vmem_limit_kib=98304)
  ;;
gpu)
  # Starts a collective as early and awaits it as late as the graph allows, which overlaps FSDP's gathers with compute.
  xla+=(--xla_gpu_enable_latency_hiding_scheduler=true)
  # Not set, by the programs that they give (jax 0.10.2): larger thresholds for combining gathers, beside none of which a
  # product then runs; pipelined gathers, which expose more of them where a step of a loop has several layers, and move 5%
  # more bytes through HBM; double buffering of loops, which changes nothing but their length. A step with gather=step
  # exposes least.
  # JAX takes three quarters of the memory by default, and nothing else on a training node would use the rest. The
  # remainder is for CUDA, cuDNN and NCCL.
  variables+=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
  ;;
none) ;;
*) die "unknown kind '$kind'; known: v4, v5e, v5p, v6e, gpu, none, auto." ;;
esac

[ ${#tpu[@]} -eq 0 ] || variables+=("LIBTPU_INIT_ARGS=${tpu[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}")
[ ${#xla[@]} -eq 0 ] || variables+=("XLA_FLAGS=${xla[*]}${XLA_FLAGS:+ $XLA_FLAGS}")
for variable in "${variables[@]}"; do
  echo "export ${variable%%=*}=$(quoted "${variable#*=}")"
done
