// Which block of a paged cache holds which tokens of which sequence (Kwon et al. 2023, PagedAttention, section 4).
// Sequences share blocks; full blocks stay known by their contents until the room is needed. No tensors, no Python.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace metate::runtime {

// No room for what was asked; nothing was changed.
struct CacheFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Statistics {
    std::int64_t blocks, block_size, free, cached, used, sequences, looked_up, hits, evictions, copies;
};

// The manager serves one thread at a time: a call while another is under way (from a second thread, or from the hook)
// throws std::logic_error. A method that throws has changed nothing. Wrong arguments throw std::invalid_argument.
class BlockManager {
  public:
    using Tokens = std::vector<std::int64_t>;
    // Called before a cached block is given to somebody else: the block, and all tokens from the beginning of the
    // sequence to the end of this block. What it throws ends the call that needed the block.
    using Hook = std::function<void(std::int64_t block, const Tokens& prefix)>;

    struct Appended {
        Tokens slots;                                               // block · block_size + row of each token
        std::vector<std::pair<std::int64_t, std::int64_t>> copies;  // (from, to): blocks to copy before writing
    };

    // hash_mask: bits of the content hash in use; fewer make collisions, which cost time and nothing else.
    BlockManager(std::int64_t blocks, std::int64_t block_size, bool prefix_cache = true,
                 std::uint64_t hash_mask = ~0ull);

    // Begins a sequence with the cached blocks that hold the beginning of `tokens`, all but the last token at most:
    // that one must run through the model to give the next. Returns the number of tokens that need not be computed.
    std::int64_t allocate(std::int64_t sequence, const Tokens& tokens);
    // Blocks that `allocate` and `append` of all these tokens would take from `available`.
    std::int64_t missing(const Tokens& tokens);
    // Room for more tokens at the end. Full blocks are known by their contents at once: whoever appends must write the
    // slots before anything reads them.
    Appended append(std::int64_t sequence, const Tokens& tokens);
    // `child` begins as a copy of `parent` that shares its blocks; whoever writes to a shared block first copies it.
    void fork(std::int64_t parent, std::int64_t child);
    // Forgets all tokens from `length` on; the blocks that they touch are not offered to other sequences again.
    void truncate(std::int64_t sequence, std::int64_t length);
    void free(std::int64_t sequence);

    std::int64_t length(std::int64_t sequence);
    // Block numbers of a sequence, in order.
    std::vector<std::int32_t> table(std::int64_t sequence);
    // The tables of several sequences, one row each, ends filled up with -1; and their lengths.
    std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>> tables(const std::vector<std::int64_t>& sequences);
    // Tokens of a sequence as its blocks hold them.
    Tokens tokens(std::int64_t sequence);
    // Blocks that append may take: free ones and cached ones that no sequence holds.
    std::int64_t available();
    Statistics statistics();
    void set_hook(Hook hook);
    // Throws std::logic_error where the tables contradict each other. Takes time linear in everything.
    void check();

  private:
    static constexpr std::int32_t kNone = -1;
    // A node is a prefix of full blocks: a number that is never used again, 0 the empty one. A block that is known by
    // its contents is `node`, reached from the node `parent` by its tokens: tokens are compared at every step, so that
    // equal hashes never make one prefix pass for another.
    struct Block {
        std::int32_t references = 0;
        std::int32_t older = kNone, newer = kNone;  // neighbours in the order of eviction
        std::uint64_t node = 0, parent = 0, hash = 0;
    };
    struct Entry {
        std::int32_t block;
        std::uint64_t node;  // of the prefix that ends with this block, 0 while it is not full or nothing is cached
    };
    struct Sequence {
        std::vector<Entry> entries;
        std::int64_t length = 0;
    };
    class Turn;

    Sequence& find(const char* method, std::int64_t sequence);
    void must_be_new(const char* method, std::int64_t sequence) const;
    std::int32_t* contents(std::int32_t block) { return contents_.data() + block * block_size_; }
    std::int32_t lookup(std::uint64_t parent, std::uint64_t hash, const std::int32_t* tokens);
    std::vector<std::int32_t> match(const Tokens& tokens);
    std::int64_t blocks_of(std::int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }
    std::uint64_t hash_of(std::uint64_t parent, const std::int32_t* tokens) const;
    void reserve(std::int64_t sequence, std::int64_t blocks);
    void announce(std::int32_t block);
    std::int32_t take();
    void hold(std::int32_t block);
    void release(std::int32_t block);
    void remember(Sequence& sequence, std::size_t index);
    void forget(std::int32_t block);
    void link(std::int32_t block);
    void unlink(std::int32_t block);

    std::int64_t block_size_;
    bool prefix_cache_;
    std::uint64_t hash_mask_;
    std::vector<Block> blocks_;
    std::vector<std::int32_t> contents_;  // tokens, block after block
    std::vector<std::int32_t> free_;
    std::unordered_map<std::int64_t, Sequence> sequences_;
    std::unordered_multimap<std::uint64_t, std::int32_t> known_;  // hash -> block
    std::unordered_map<std::uint64_t, std::int32_t> home_;        // node -> block
    std::int32_t oldest_ = kNone, newest_ = kNone;
    std::int64_t cached_ = 0;
    std::uint64_t nodes_ = 0;
    std::int64_t looked_up_ = 0, hits_ = 0, evictions_ = 0, copies_ = 0;
    Hook hook_;
    std::atomic<bool> busy_{false};
};

}  // namespace metate::runtime
