#include "aer/partition.hpp"

#include "arrays.hpp"
#include "register.hpp"

namespace aer::bindings {
namespace {

py::array_t<std::int64_t> call(const py::object& weights, std::int64_t num_parts, bool equal_size) {
    const auto values = checked<std::int64_t>(weights, "weights");
    std::vector<std::int64_t> parts;
    {
        const py::gil_scoped_release release;
        parts = balanced_partition(span(values), num_parts, equal_size);
    }
    return to_numpy(std::move(parts));
}

}  // namespace

void register_partition(py::module_& m) {
    m.def("balanced_partition", &call, py::arg("weights"), py::arg("num_parts"), py::kw_only(), py::arg("equal_size"),
          "Return the part of each sequence such that the parts weigh nearly the same.");
}

}  // namespace aer::bindings
