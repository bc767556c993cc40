#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "aer/hashing.hpp"

using aer::Checksum64;

namespace {

std::uint64_t xxh64(const std::string& text) {
    Checksum64 checksum;
    checksum.update(text.data(), text.size());
    return checksum.digest();
}

}  // namespace

TEST_CASE("XXH64 gives the published values") {
    CHECK(xxh64("") == 0xEF46DB3751D8E999ULL);
    CHECK(xxh64("a") == 0xD24EC4F1A98C6E5BULL);
    CHECK(xxh64("abc") == 0x44BC2CF5AD770999ULL);
    CHECK(xxh64("Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1ULL);
}

TEST_CASE("a checksum does not depend on how its input was cut") {
    std::string text;
    for (int i = 0; i < 301; ++i) text.push_back(static_cast<char>(i * 7));
    for (std::size_t size = 0; size <= text.size(); size += 13) {
        const std::string head = text.substr(0, size);
        for (const std::size_t piece : {1, 3, 8, 31, 32, 33, 100}) {
            Checksum64 checksum;
            for (std::size_t at = 0; at < size; at += piece)
                checksum.update(head.data() + at, std::min<std::size_t>(piece, size - at));
            CHECK(checksum.digest() == xxh64(head));
        }
    }
}

TEST_CASE("splitmix64 gives the reference generator's first outputs") {
    // Seeded with 1234567 the generator returns mix(seed + k * gamma), k = 1, 2, ...
    CHECK(aer::splitmix64(1234567) == 6457827717110365317ULL);
    CHECK(aer::splitmix64(1234567 + 0x9E3779B97F4A7C15ULL) == 3203168211198807973ULL);
}

TEST_CASE("splitmix64_inverse undoes splitmix64") {
    std::uint64_t x = 0;
    for (int i = 0; i < 10000; ++i) {
        CHECK(aer::splitmix64_inverse(aer::splitmix64(x)) == x);
        x = aer::splitmix64(x);
    }
    CHECK(aer::splitmix64_inverse(aer::splitmix64(UINT64_MAX)) == UINT64_MAX);
}
