// The floating-point types that kernels read and write.
#pragma once

namespace mmgen_kernels {

enum class Float { fp64, fp32, bf16, fp16 };

}  // namespace mmgen_kernels
