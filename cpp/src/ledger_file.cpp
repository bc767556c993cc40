// The ledger's file: header, records sorted by key, XXH64 of everything before it. Little-endian throughout.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "aer/ledger.hpp"
#include "aer/message.hpp"

namespace aer {
namespace {

constexpr char kMagic[8] = {'A', 'E', 'R', 'L', 'E', 'D', 'G', 'R'};
constexpr std::uint32_t kFormatVersion = 2;
constexpr std::size_t kBlockRecords = 65536;

struct Header {
    char magic[8];
    std::uint32_t format_version;
    std::uint32_t record_bytes;
    double decay;
    std::uint64_t count;
};
static_assert(sizeof(Header) == 32);

[[noreturn]] void throw_system(const std::string& path) {
    throw std::system_error(errno, std::generic_category(), path);
}

class File {
  public:
    File(const std::string& path, int flags) : path_(path), descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
        if (descriptor_ < 0) throw_system(path_);
    }
    ~File() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    void write(const void* bytes, std::size_t size) {
        const char* at = static_cast<const char*>(bytes);
        while (size > 0) {
            const ssize_t written = ::write(descriptor_, at, size);
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) throw_system(path_);
            at += written;
            size -= static_cast<std::size_t>(written);
        }
    }
    // Returns the bytes read: fewer than `size` only at the end of the file.
    std::size_t read(void* bytes, std::size_t size) {
        char* at = static_cast<char*>(bytes);
        std::size_t total = 0;
        while (total < size) {
            const ssize_t got = ::read(descriptor_, at + total, size - total);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) throw_system(path_);
            if (got == 0) break;
            total += static_cast<std::size_t>(got);
        }
        return total;
    }
    std::uint64_t size() const {
        struct stat status {};
        if (::fstat(descriptor_, &status) != 0) throw_system(path_);
        return static_cast<std::uint64_t>(status.st_size);
    }
    void sync() {
        if (::fsync(descriptor_) != 0) throw_system(path_);
    }

  private:
    std::string path_;
    int descriptor_;
};

bool sane(const Record& record) {
    return record.successes <= record.attempts && record.last_step >= 0 && record.entropy_sum >= 0 &&
           record.entropy_sum <= kEntropyMax && record.decayed_successes >= 0.0 && record.decayed_failures >= 0.0 &&
           std::isfinite(record.decayed_successes) && std::isfinite(record.decayed_failures);
}

Header read_header(File& file, const std::string& path, std::optional<double> decay) {
    const auto fail = [&path](const auto&... what) { throw std::invalid_argument(message(path, ": ", what...)); };
    Header header{};
    const std::size_t got = file.read(&header, sizeof header);
    if (got < sizeof header.magic || std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) fail("not a difficulty ledger file");
    if (got < sizeof header) fail("truncated: ", got, " bytes, the header alone has ", sizeof header);
    if (header.format_version != kFormatVersion)
        fail("format version ", header.format_version, "; this build reads version ", kFormatVersion,
             "; start a new run.output_dir, or read the file with the version that wrote it");
    const std::uint64_t size = file.size();
    const std::uint64_t most = (UINT64_MAX - sizeof header - 8) / sizeof(Record);
    if (header.record_bytes != sizeof(Record) || !(header.decay > 0.0 && header.decay <= 1.0) || header.count > most)
        fail("corrupt header");
    const std::uint64_t expected = sizeof header + header.count * sizeof(Record) + 8;
    if (size < expected) fail("truncated: ", size, " bytes where ", header.count, " prompts need ", expected);
    if (size > expected) fail("corrupt: ", size, " bytes where ", header.count, " prompts need ", expected);
    if (decay && *decay != header.decay) fail("was written with decay ", header.decay, ", expected decay ", *decay);
    return header;
}

void sync_folder(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    File(slash == std::string::npos ? "." : path.substr(0, slash + 1), O_RDONLY | O_DIRECTORY).sync();
}

}  // namespace

void Ledger::save(const std::string& path) const {
    const std::string temporary = message(path, ".tmp.", ::getpid());
    try {
        File file(temporary, O_WRONLY | O_CREAT | O_TRUNC);
        Checksum64 checksum;
        const auto write = [&](const void* bytes, std::size_t size) {
            checksum.update(bytes, size);
            file.write(bytes, size);
        };
        const std::shared_lock<std::shared_mutex> lock(mutex_);
        Header header{{}, kFormatVersion, sizeof(Record), decay(), table_.size()};
        std::memcpy(header.magic, kMagic, sizeof kMagic);
        write(&header, sizeof header);
        std::vector<Record> block;
        for (std::size_t shard = 0; shard < RecordTable::kShards; ++shard) {
            block.clear();
            for (const Record* const record : table_.by_key(shard)) block.push_back(*record);
            write(block.data(), block.size() * sizeof(Record));
        }
        const std::uint64_t digest = checksum.digest();
        file.write(&digest, sizeof digest);
        file.sync();
    } catch (...) {
        ::unlink(temporary.c_str());
        throw;
    }
    if (::rename(temporary.c_str(), path.c_str()) != 0) {
        const int error = errno;
        ::unlink(temporary.c_str());
        errno = error;
        throw_system(path);
    }
    sync_folder(path);
}

std::unique_ptr<Ledger> Ledger::load(const std::string& path, std::optional<double> decay) {
    File file(path, O_RDONLY);
    const Header header = read_header(file, path, decay);
    auto ledger = std::make_unique<Ledger>(header.decay, static_cast<std::int64_t>(header.count));
    Checksum64 checksum;
    checksum.update(&header, sizeof header);
    std::vector<Record> block(std::min<std::uint64_t>(kBlockRecords, header.count));
    bool ordered = true;
    std::uint64_t previous = 0;
    for (std::uint64_t start = 0; start < header.count; start += kBlockRecords) {
        const std::size_t n = std::min<std::uint64_t>(kBlockRecords, header.count - start);
        if (file.read(block.data(), n * sizeof(Record)) != n * sizeof(Record))
            throw std::invalid_argument(message(path, ": truncated while it was read"));
        checksum.update(block.data(), n * sizeof(Record));
        for (std::size_t i = 0; i < n && ordered; ++i) {
            ordered = sane(block[i]) && (start + i == 0 || block[i].key > previous);
            previous = block[i].key;
            if (ordered) ledger->append(block[i]);
        }
    }
    std::uint64_t digest = 0;
    if (file.read(&digest, sizeof digest) != sizeof digest || digest != checksum.digest())
        throw std::invalid_argument(message(path, ": corrupt: its XXH64 checksum does not match its content"));
    if (!ordered) throw std::invalid_argument(message(path, ": corrupt: records out of order or out of range"));
    return ledger;
}

}  // namespace aer
