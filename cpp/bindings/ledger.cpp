#include "aer/ledger.hpp"

#include <pybind11/stl.h>

#include "aer/ledger_summary.hpp"
#include "arrays.hpp"
#include "register.hpp"

namespace aer::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

struct PyRows {
    py::array_t<std::uint64_t> prompt_ids;
    py::array_t<double> decayed_successes, decayed_failures;
    py::array_t<std::int64_t> attempts, successes, last_step;
    py::array_t<double> entropy_sum;
    py::array_t<std::int64_t> token_count;
};

PyRows rows_to_numpy(LedgerRows&& rows) {
    return {to_numpy(std::move(rows.prompt_ids)),       to_numpy(std::move(rows.decayed_successes)),
            to_numpy(std::move(rows.decayed_failures)), to_numpy(std::move(rows.attempts)),
            to_numpy(std::move(rows.successes)),        to_numpy(std::move(rows.last_step)),
            to_numpy(std::move(rows.entropy_sum)),      to_numpy(std::move(rows.token_count))};
}

py::dict as_dict(const PyRows& rows) {
    py::dict columns;
    columns["prompt_ids"] = rows.prompt_ids;
    columns["decayed_successes"] = rows.decayed_successes;
    columns["decayed_failures"] = rows.decayed_failures;
    columns["attempts"] = rows.attempts;
    columns["successes"] = rows.successes;
    columns["last_step"] = rows.last_step;
    columns["entropy_sum"] = rows.entropy_sum;
    columns["token_count"] = rows.token_count;
    return columns;
}

void update(Ledger& ledger, const py::object& prompt_ids, const py::object& attempts, const py::object& successes,
            const py::object& entropy_sum, const py::object& token_count, std::int64_t step) {
    const auto ids = checked<std::uint64_t>(prompt_ids, "prompt_ids");
    const auto tries = checked<std::int64_t>(attempts, "attempts");
    const auto wins = checked<std::int64_t>(successes, "successes");
    const auto entropies = checked<double>(entropy_sum, "entropy_sum");
    const auto tokens = checked<std::int64_t>(token_count, "token_count");
    const LedgerBatch batch{span(ids), span(tries), span(wins), span(entropies), span(tokens)};
    const py::gil_scoped_release release;
    ledger.update(batch, step);
}

PyRows lookup(const Ledger& ledger, const py::object& prompt_ids) {
    const auto ids = checked<std::uint64_t>(prompt_ids, "prompt_ids");
    LedgerRows rows;
    {
        const py::gil_scoped_release release;
        rows = ledger.lookup(span(ids));
    }
    return rows_to_numpy(std::move(rows));
}

PyRows export_rows(const Ledger& ledger) {
    LedgerRows rows;
    {
        const py::gil_scoped_release release;
        rows = ledger.export_rows();
    }
    return rows_to_numpy(std::move(rows));
}

py::array_t<double> posterior_mean(const Ledger& ledger, const py::object& prompt_ids, double prior_success,
                                   double prior_failure, std::int64_t step) {
    const auto ids = checked<std::uint64_t>(prompt_ids, "prompt_ids");
    std::vector<double> means;
    {
        const py::gil_scoped_release release;
        means = ledger.posterior_mean(span(ids), BetaPrior{prior_success, prior_failure}, step);
    }
    return to_numpy(std::move(means));
}

py::array_t<std::int64_t> call_histogram2d(const Ledger& ledger, const py::object& difficulty_edges,
                                           const py::object& entropy_edges, double prior_success, double prior_failure,
                                           std::int64_t step) {
    const auto rows = checked<double>(difficulty_edges, "difficulty_edges");
    const auto columns = checked<double>(entropy_edges, "entropy_edges");
    std::vector<std::int64_t> counts;
    {
        const py::gil_scoped_release release;
        counts = histogram2d(ledger, span(rows), span(columns), BetaPrior{prior_success, prior_failure}, step);
    }
    return to_numpy(std::move(counts)).reshape({rows.size() - 1, columns.size() - 1});
}

py::array_t<double> call_quantiles(const Ledger& ledger, const py::object& q, double prior_success,
                                   double prior_failure, std::int64_t step) {
    const auto places = checked<double>(q, "q");
    std::vector<double> values;
    {
        const py::gil_scoped_release release;
        values = difficulty_quantiles(ledger, span(places), BetaPrior{prior_success, prior_failure}, step);
    }
    return to_numpy(std::move(values));
}

void register_rows(py::module_& m) {
    py::class_<PyRows> rows(m, "LedgerRows", plain_type(), py::is_final(),
                            "Ledger records of P prompts as NumPy columns.");
    rows.def_readonly("prompt_ids", &PyRows::prompt_ids)
        .def_readonly("decayed_successes", &PyRows::decayed_successes)
        .def_readonly("decayed_failures", &PyRows::decayed_failures)
        .def_readonly("attempts", &PyRows::attempts)
        .def_readonly("successes", &PyRows::successes)
        .def_readonly("last_step", &PyRows::last_step)
        .def_readonly("entropy_sum", &PyRows::entropy_sum)
        .def_readonly("token_count", &PyRows::token_count)
        .def("as_dict", &as_dict, "Return the columns by name.")
        .def("__len__", [](const PyRows& self) { return self.prompt_ids.size(); });
    forbid_new(rows);
}

}  // namespace

void register_ledger(py::module_& m) {
    register_rows(m);
    py::class_<Ledger> ledger(m, "DifficultyLedger", plain_type(), py::is_final(),
                              "Per-prompt rollout history keyed by a 64-bit prompt id.");
    ledger.def(py::init<double, std::int64_t>(), py::arg("decay"), py::arg("capacity_hint"))
        .def("update", &update, py::arg("prompt_ids"), py::arg("attempts"), py::arg("successes"),
             py::arg("entropy_sum"), py::arg("token_count"), py::kw_only(), py::arg("step"),
             "Add one batch; all of it or, on an error, nothing.")
        .def("lookup", &lookup, py::arg("prompt_ids"),
             "Return the records of the prompts; unknown: zeros, last_step -1.")
        .def("posterior_mean", &posterior_mean, py::arg("prompt_ids"), py::kw_only(), py::arg("prior_success"),
             py::arg("prior_failure"), py::arg("step"),
             "Return each prompt's Beta posterior mean success rate at `step`.")
        .def("histogram2d", &call_histogram2d, py::arg("difficulty_edges"), py::arg("entropy_edges"), py::kw_only(),
             py::arg("prior_success"), py::arg("prior_failure"), py::arg("step"),
             "Return prompt counts by difficulty and mean token entropy.")
        .def("quantiles", &call_quantiles, py::arg("q"), py::kw_only(), py::arg("prior_success"),
             py::arg("prior_failure"), py::arg("step"), "Return quantiles of difficulty, 1 - posterior mean.")
        .def("copy", method(&Ledger::copy), Release(), "Return another ledger with the same records.")
        .def("export", &export_rows, "Return all records sorted by prompt id.")
        .def("save", method(&Ledger::save), py::arg("path"), Release(), "Write the ledger to a file, atomically.")
        .def_static("load", &Ledger::load, py::arg("path"), py::kw_only(), py::arg("decay") = std::nullopt, Release(),
                    "Return the ledger in a file written by save().")
        .def_property_readonly("decay", method(&Ledger::decay))
        .def_property_readonly("nbytes", py::cpp_function(method(&Ledger::nbytes), Release()))
        .def("__len__", method(&Ledger::size), Release())
        .def(
            "__eq__",
            [](const Ledger& self, const py::object& other) -> py::object {
                if (!py::isinstance<Ledger>(other)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
                const auto& right = other.cast<const Ledger&>();
                bool equal = false;
                {
                    const py::gil_scoped_release release;
                    equal = self.equals(right);
                }
                return py::bool_(equal);
            },
            py::arg("other"));
    ledger.attr("__hash__") = py::none();
    forbid_new(ledger);
}

}  // namespace aer::bindings
