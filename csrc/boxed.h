// Kernels as the dispatcher calls them, without the string that torch leaves on the heap for each of their string arguments: up to
// 2.13, its conversion returns a copy of one made by new (pytorch#191340). 48 bytes a call, which also keep glibc from joining the
// large blocks around them: a process that trains a DiT grew by 15 MB a step.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace mmgen_kernels {

struct Text {
  std::string value;
};

}  // namespace mmgen_kernels

// The handle is ours to delete.
template <>
struct torch::stable::detail::ToImpl<mmgen_kernels::Text> {
  static mmgen_kernels::Text call(StableIValue from, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(from);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    mmgen_kernels::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

namespace mmgen_kernels {

// How an argument of a kernel is taken from the dispatcher, and given to the kernel.
template <class T>
struct Argument {
  using Taken = T;
  static T& given(std::remove_reference_t<T>& taken) { return taken; }
};
template <>
struct Argument<std::string> {
  using Taken = Text;
  static std::string&& given(Text& taken) { return std::move(taken.value); }
};
template <>
struct Argument<const std::string&> : Argument<std::string> {};
template <>
struct Argument<std::optional<std::string>> {
  using Taken = std::optional<Text>;
  static std::optional<std::string> given(Taken& taken) {
    return taken ? std::optional<std::string>(std::move(taken->value)) : std::nullopt;
  }
};

template <auto kernel>
struct Boxed;
template <class Result, class... Arguments, Result (*kernel)(Arguments...)>
struct Boxed<kernel> {
  static Result call(typename Argument<Arguments>::Taken... taken) { return kernel(Argument<Arguments>::given(taken)...); }
};

}  // namespace mmgen_kernels

// For m.impl(name, ...), in place of TORCH_BOX.
#define BOXED(kernel) TORCH_BOX(&mmgen_kernels::Boxed<kernel>::call)
