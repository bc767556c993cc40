// The ledger's file: header, records sorted by key, XXH64 of everything before it. Little-endian throughout.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
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
constexpr std::uint64_t kTrusted = std::uint64_t{1} << 20;

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
    File(const std::string& path, int flags) : path_(path), descriptor_(open_checked(path, flags)) {
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
    std::uint64_t size() const { return static_cast<std::uint64_t>(status().st_size); }
    bool is_regular() const { return S_ISREG(status().st_mode); }
    void sync() {
        if (::fsync(descriptor_) != 0) throw_system(path_);
    }

  private:
    // -1 with errno where it fails. A path with a zero byte would name another file.
    static int open_checked(const std::string& path, int flags) {
        if (path.find('\0') != std::string::npos)
            throw std::invalid_argument("a ledger's path must not hold a zero byte");
        return ::open(path.c_str(), flags | O_CLOEXEC, 0644);
    }
    struct stat status() const {
        struct stat found{};
        if (::fstat(descriptor_, &found) != 0) throw_system(path_);
        return found;
    }

    std::string path_;
    int descriptor_;
};

// What every update keeps: decayed sums never exceed lifetime counts (comparisons that a NaN fails, too).
bool sane(const Record& record) {
    return record.successes <= record.attempts && record.last_step >= 0 && record.entropy_sum >= 0 &&
           record.entropy_sum <= kEntropyMax && record.decayed_successes >= 0.0 && record.decayed_failures >= 0.0 &&
           record.decayed_successes <= record.successes &&
           record.decayed_failures <= record.attempts - record.successes;
}

// A name that no other save, thread or process has: two of them would write into one file.
std::string temporary_name(const std::string& path) {
    static std::atomic<std::uint64_t> count{0};
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    const std::uint64_t salt =
        splitmix64(static_cast<std::uint64_t>(now) ^ (std::uint64_t{std::random_device{}()} << 32));
    return message(path, ".tmp.", ::getpid(), ".", count++, ".", salt);
}

Header read_header(File& file, const std::string& path, std::optional<double> decay) {
    const auto fail = [&path](const auto&... what) { throw std::invalid_argument(message(path, ": ", what...)); };
    Header header{};
    const std::size_t got = file.read(&header, sizeof header);
    if (got < sizeof header.magic || std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
        fail("not a difficulty ledger file");
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
    const std::string temporary = temporary_name(path);
    File file(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW);
    try {
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
        block.reserve(kBlockRecords);
        const auto flush = [&] {
            write(block.data(), block.size() * sizeof(Record));
            block.clear();
        };
        table_.for_each([&](const Record& record) {
            block.push_back(record);
            if (block.size() == kBlockRecords) flush();
        });
        flush();
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
    File file(path, O_RDONLY | O_NONBLOCK);  // the opening of a pipe would wait for a writer
    if (!file.is_regular()) throw std::invalid_argument(message(path, ": not a regular file"));
    const Header header = read_header(file, path, decay);
    auto ledger = std::make_unique<Ledger>(header.decay, 0);
    Checksum64 checksum;
    checksum.update(&header, sizeof header);
    std::vector<Record> block(std::min<std::uint64_t>(kBlockRecords, header.count));
    std::uint64_t previous = 0, room = 0;
    for (std::uint64_t start = 0; start < header.count; start += kBlockRecords) {
        const std::size_t n = std::min<std::uint64_t>(kBlockRecords, header.count - start);
        if (file.read(block.data(), n * sizeof(Record)) != n * sizeof(Record))
            throw std::invalid_argument(message(path, ": truncated while it was read"));
        checksum.update(block.data(), n * sizeof(Record));
        // the file's length proves nothing, it may have holes: room is made for twice what has come and was in order
        if (start + n > room) {
            room = std::min(header.count, std::max(kTrusted, 2 * start));
            ledger->table_.reserve(room);
        }
        for (std::size_t i = 0; i < n; ++i) {
            if (!sane(block[i]) || (start + i > 0 && block[i].key <= previous))
                throw std::invalid_argument(
                    message(path, ": corrupt: record ", start + i, " is out of order or out of range"));
            previous = block[i].key;
            ledger->table_.append(block[i]);
        }
    }
    std::uint64_t digest = 0;
    if (file.read(&digest, sizeof digest) != sizeof digest || digest != checksum.digest())
        throw std::invalid_argument(message(path, ": corrupt: its XXH64 checksum does not match its content"));
    return ledger;
}

}  // namespace aer
