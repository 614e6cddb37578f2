// Torch hands an op its arguments one by one; an op body takes those that belong together as one
// struct. unpacked<body> is the function of single arguments that fills the structs:
//
//     m.impl("lowrank_add", TORCH_BOX(unpacked<lowrank_add<lowrank_add_cpu>>));
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

namespace lowrank_ext {

// The schema's arguments that make up a parameter. A struct names the types of its fields, in their
// order, as Arguments; any other parameter is one argument.
template <class Parameter>
struct ArgumentsOf {
  using type = std::tuple<Parameter>;
};
template <class Parameter>
  requires requires { typename Parameter::Arguments; }
struct ArgumentsOf<Parameter> {
  using type = typename Parameter::Arguments;
};

template <class Parameter>
using arguments_of_t = typename ArgumentsOf<std::remove_cvref_t<Parameter>>::type;

// The parameter that starts at argument `first`: a struct by value, anything else by reference.
template <class Parameter, size_t first, class Arguments>
decltype(auto) parameter_from(const Arguments& arguments) {
  using Fields = arguments_of_t<Parameter>;
  if constexpr (std::is_same_v<Fields, std::tuple<Parameter>>) {
    return std::get<first>(arguments);
  } else {
    return [&]<size_t... field>(std::index_sequence<field...>) {
      return Parameter{std::get<first + field>(arguments)...};
    }(std::make_index_sequence<std::tuple_size_v<Fields>>());
  }
}

template <auto body, class Body, class Arguments>
struct Unpacked;

template <auto body, class Result, class... Parameters, class... Arguments>
struct Unpacked<body, Result (*)(Parameters...), std::tuple<Arguments...>> {
  static Result call(const Arguments&... arguments) {
    return call_body(std::tuple<const Arguments&...>(arguments...),
                     std::index_sequence_for<Parameters...>());
  }

 private:
  // kFirst[i]: the first argument of parameter i.
  static constexpr auto kFirst = [] {
    std::array<size_t, sizeof...(Parameters) + 1> first{};
    size_t i = 0;
    ((first[i + 1] = first[i] + std::tuple_size_v<arguments_of_t<Parameters>>, ++i), ...);
    return first;
  }();

  template <size_t... i>
  static Result call_body(const std::tuple<const Arguments&...>& arguments,
                          std::index_sequence<i...>) {
    return body(parameter_from<std::remove_cvref_t<Parameters>, kFirst[i]>(arguments)...);
  }
};

template <class Result, class... Parameters>
auto all_arguments(Result (*)(Parameters...))
    -> decltype(std::tuple_cat(std::declval<arguments_of_t<Parameters>>()...));

template <auto body>
inline constexpr auto unpacked =
    &Unpacked<body, decltype(body), decltype(all_arguments(body))>::call;

}  // namespace lowrank_ext
