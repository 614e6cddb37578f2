#include "common/round_adapters.cuh"

#include "common/kernels.h"

namespace lowrank_ext::cuda {

void round_adapters(const AdapterCopy* copies, int num_copies, const Device& device) {
  switch (copies[0].rounded.type) {
    case ElementType::kBf16:
      return launch_round_adapters<Bf16::scalar_t>(copies, num_copies, device);
    case ElementType::kFp16:
      return launch_round_adapters<Fp16::scalar_t>(copies, num_copies, device);
    case ElementType::kFp32:
      return launch_round_adapters<float>(copies, num_copies, device);
    case ElementType::kFp64:
      return launch_round_adapters<double>(copies, num_copies, device);
  }
}

}  // namespace lowrank_ext::cuda
