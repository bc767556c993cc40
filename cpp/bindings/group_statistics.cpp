#include "aer/group_statistics.hpp"

#include "arrays.hpp"
#include "register.hpp"

namespace aer::bindings {
namespace {

struct PyGroupStatistics {
    py::array_t<std::int64_t> group_ids, counts, successes;
    py::array_t<double> mean, std, advantage;
    py::array_t<std::int64_t> group_index;
};

PyGroupStatistics call(const py::object& group_ids, const py::object& rewards, double std_epsilon, bool divide_by_std) {
    const auto ids = checked<std::int64_t>(group_ids, "group_ids");
    const auto values = checked<double>(rewards, "rewards");
    GroupStatistics result;
    {
        const py::gil_scoped_release release;
        result = group_statistics(span(ids), span(values), std_epsilon, divide_by_std);
    }
    return {to_numpy(std::move(result.group_ids)),  to_numpy(std::move(result.counts)),
            to_numpy(std::move(result.successes)),  to_numpy(std::move(result.mean)),
            to_numpy(std::move(result.std)),        to_numpy(std::move(result.advantage)),
            to_numpy(std::move(result.group_index))};
}

}  // namespace

void register_group_statistics(py::module_& m) {
    py::class_<PyGroupStatistics> statistics(m, "GroupStatistics", plain_type(), py::is_final(),
                                             "Statistics of P groups over B rollouts.");
    statistics.def_readonly("group_ids", &PyGroupStatistics::group_ids)
        .def_readonly("counts", &PyGroupStatistics::counts)
        .def_readonly("successes", &PyGroupStatistics::successes)
        .def_readonly("mean", &PyGroupStatistics::mean)
        .def_readonly("std", &PyGroupStatistics::std)
        .def_readonly("advantage", &PyGroupStatistics::advantage)
        .def_readonly("group_index", &PyGroupStatistics::group_index);
    forbid_new(statistics);
    m.def("group_statistics", &call, py::arg("group_ids"), py::arg("rewards"), py::kw_only(), py::arg("std_epsilon"),
          py::arg("divide_by_std"),
          "Return counts, successes, mean, unbiased std and group-relative advantages of ragged groups.");
}

}  // namespace aer::bindings
