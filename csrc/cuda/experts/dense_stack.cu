#include "experts/dense_stack.cuh"

#include "experts/kernels.h"

namespace lowrank_ext::cuda {

void dense_stack(ComputeType compute_type, const DenseColumns& columns,
                 const MatrixRef& router_weight, const MatrixRef& lora_a, const MatrixRef& lora_b,
                 const MatrixRef& w, const MatrixRef& up, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    launch_dense_stack<Compute>(
        {columns, input_of<Compute>(router_weight), input_of<Compute>(lora_a),
         input_of<Compute>(lora_b), matrix_of<scalar_t>(w), matrix_of<scalar_t>(up)},
        device.stream);
  });
}

void dense_unstack(ComputeType compute_type, const DenseColumns& columns, const MatrixRef& dw,
                   int num_partials, const MatrixRef& dup, const MatrixRef& drouter_weight,
                   const MatrixRef& dlora_a, const MatrixRef& dlora_b, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using acc_t = typename Compute::acc_t;
    launch_dense_unstack<Compute>({columns, matrix_of<const acc_t>(dw), matrix_of<const acc_t>(dup),
                                   num_partials, output_of<Compute>(drouter_weight),
                                   output_of<Compute>(dlora_a), output_of<Compute>(dlora_b)},
                                  device.stream);
  });
}

}  // namespace lowrank_ext::cuda
