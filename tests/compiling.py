"""Compiler options: most tests compile quickly, those of exactness compile as users do."""

import jax

# XLA's fusion emitters take three quarters of the time in which a training step compiles. Newer
# versions do not have the flag and abort on it.
_EMITTERS_ARE_OPTIONAL = jax.__version_info__ < (0, 11)

FLAGS = "--xla_force_host_platform_device_count=8"
if _EMITTERS_ARE_OPTIONAL:
  FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# jax.jit(..., compiler_options=AS_USERS_DO) restores the defaults of XLA.
AS_USERS_DO: dict[str, int | bool] = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}
if _EMITTERS_ARE_OPTIONAL:
  AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True
