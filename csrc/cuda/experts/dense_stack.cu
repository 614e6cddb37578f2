#include "experts/dense_stack.cuh"

namespace lowrank_ext::cuda {

void stack_experts(NumberKind kind, const ExpertColumns& columns, const Any& router_weight,
                   const Any& lora_a, const Any& lora_b, const Any& w, const Any& up,
                   const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    launch_stack_experts<Number>(
        {columns, input_of<Number>(router_weight), input_of<Number>(lora_a),
         input_of<Number>(lora_b), matrix_of<scalar_t>(w), matrix_of<scalar_t>(up)},
        device.stream);
  });
}

void unstack_experts(NumberKind kind, const ExpertColumns& columns, const Any& dw, int num_partials,
                     const Any& dup, const Any& drouter_weight, const Any& dlora_a,
                     const Any& dlora_b, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using acc_t = typename Number::acc_t;
    launch_unstack_experts<Number>(
        {columns, matrix_of<const acc_t>(dw), matrix_of<const acc_t>(dup), num_partials,
         output_of<Number>(drouter_weight), output_of<Number>(dlora_a), output_of<Number>(dlora_b)},
        device.stream);
  });
}

}  // namespace lowrank_ext::cuda
