// Work on a few threads that end before the call does.
#pragma once

#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace aer {

// Calls work(0), ..., work(num_threads - 1), the first on the calling thread, and returns when all are done; rethrows
// the exception of the lowest number. Where the system refuses a thread, its share runs on the calling one.
template <class Work>
void run_parallel(std::size_t num_threads, Work&& work) {
    std::vector<std::exception_ptr> errors(num_threads);
    const auto guarded = [&](std::size_t thread) {
        try {
            work(thread);
        } catch (...) {
            errors[thread] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(num_threads);
    std::size_t refused = num_threads;
    for (std::size_t thread = 1; thread < num_threads; ++thread) {
        try {
            threads.emplace_back(guarded, thread);
        } catch (const std::system_error&) {
            refused = thread;
            break;
        }
    }
    guarded(0);
    for (std::size_t thread = refused; thread < num_threads; ++thread) guarded(thread);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace aer
