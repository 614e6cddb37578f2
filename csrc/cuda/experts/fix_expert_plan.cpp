// Only in a library built for benchmarks: how benchmarks/bench_expert_forms.py sets the plan, by
// ctypes. 0 is the dense form, 1 the grouped one, 2 the grouped one with a dense up backward,
// anything else what is planned.
#ifdef LOWRANK_EXT_BENCHMARKS
#include "experts/plan_experts.h"

extern "C" __attribute__((visibility("default"))) void lowrank_ext_fix_expert_plan(int form) {
  using lowrank_ext::cuda::ExpertPlan, lowrank_ext::cuda::fixed_expert_plan;
  const bool is_form = form >= 0 && form <= 2;
  fixed_expert_plan = is_form ? std::optional(ExpertPlan{form > 0, form == 2}) : std::nullopt;
}
#endif
