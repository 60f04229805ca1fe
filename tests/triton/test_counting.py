"""What every Triton op loads and stores, counted in the interpreter, is what its contract declares."""

import pytest
from triton_processes import needs_interpreter, rows_for_all

from resnet_fused.backends import triton as room

pytestmark = needs_interpreter

NARROW = ("conv1x1_backward",)  # not of the deep layer
SMALL = (
    "bn_affine",
    "bn_coefficients",
    "running_affine",
    "running_update",
    "gram_norm",
    "gram_grad",
)  # of weights; all in L2
#: Vectors and partial sums, which `bytes()` leaves out, as a share of it at 56 x 56 and batch 256. Sums over rows into
#: a matrix take more in deeper layers, which would leave most SMs idle otherwise; all fit into an L2 of 40 MB.
OVERHEAD = 0.02
WORKSPACE_BYTES = 10e6
#: What may be read at a stride, and the sizes of an image: pixels that are read, height and width.
STRIDED = {
    "conv1x1_kernel": ("x_ptr", "HW_OUT", "H", "W"),
    "conv1x1_join_kernel": ("x2_ptr", "HW_OUT", "H2", "W2"),
    "conv1x1_dgrad_kernel": ("x_ptr", "HW", "X_H", "X_W"),
    "conv1x1_wgrad_kernel": ("x_ptr", "HW_OUT", "H", "W"),
    "gram_kernel": ("a_ptr", "HW_OUT", "H", "W"),
}


def ceil(a, b):
    return -(-a // b)


def channels(sizes, which):
    return sizes[f"UNITS_{which}"] * sizes[f"DIV_{which}"]


def again(kernel, sizes, names):
    """How often a launch asks for each byte of an argument that it touches more than once; by name."""
    if kernel == "bn_stats_kernel":  # the first tile of a chunk twice
        return {"z_ptr": 1 + sizes["chunks"] * sizes["BLOCK_M"] / sizes["M"]}
    if kernel.startswith("norm_relu_pool"):  # each pixel for each 3x3 window over it, each window's for each pixel
        pairs = (sizes["H"] + (sizes["H"] + 1) // 2 - 1) ** 2
        pooled, pixels = ((sizes["H"] + 1) // 2) ** 2, sizes["H"] ** 2
        if kernel == "norm_relu_pool_kernel":
            return {"z_ptr": pairs / pixels}
        return dict.fromkeys(("grad_ptr", "index_ptr"), pairs / pooled)
    if kernel in (
        "norm_relu_avg_pool_backward_kernel",
        "norm_relu_avg_pool_apply_kernel",
    ):  # each window's, by its pixels
        return {"grad_ptr": sizes["KERNEL_H"] * sizes["KERNEL_W"]}
    if kernel.startswith("dense_conv"):
        return again_in_dense_layers(kernel, sizes)
    if kernel == "gram_kernel":  # a tile of columns meets every other and, once for both sides, itself
        return {"a_ptr": sizes["column_tiles"]}
    if kernel == "gram_merge_kernel":  # the diagonal is its own mirror image
        return {"gram_ptr": 1 + 1 / sizes["C"]}
    if kernel == "conv1x1_wgrad_kernel":
        outputs, inputs = (ceil(channels(sizes, w), sizes[f"BLOCK_{w}"]) for w in "KC")
        return dict.fromkeys(("g_ptr", "z_ptr", "mask_ptr"), inputs) | {"x_ptr": outputs}
    if kernel == "gram_grad_kernel":  # a tile of the coupling reads two columns of tiles of the weight
        columns, tiles = (ceil(sizes["UNITS"] * sizes["DIV"], sizes[block]) for block in ("BLOCK_N", "SQUARE"))
        return {"weight_ptr": columns + tiles + 1, "gram_ptr": ceil(sizes["K"], sizes["BLOCK_M"])}
    if kernel == "conv1x1_backward_kernel":
        rows, columns = ceil(sizes["M"], sizes["BLOCK_M"]), ceil(channels(sizes, "C"), sizes["BLOCK_C"])
        shared = dict.fromkeys(("g_ptr", "z_ptr", "mask_ptr"), columns)
        return shared | dict.fromkeys(("weight_ptr", "coupling_ptr"), rows)
    if kernel not in ("conv1x1_kernel", "conv1x1_join_kernel", "conv1x1_dgrad_kernel"):
        return {}
    rows = ceil(sizes["M"], sizes["BLOCK_M"])
    columns = ceil(channels(sizes, "C" if "UNITS_C" in sizes else "OUT"), sizes["BLOCK_N"])
    matrices = dict.fromkeys(("weight_ptr", "weight2_ptr", "coupling_ptr"), rows)
    if kernel != "conv1x1_dgrad_kernel":
        return matrices | {"x_ptr": columns, "x2_ptr": columns}
    lazy = dict.fromkeys(("g_ptr", "z_ptr", "mask_ptr"), columns)
    # x is an operand of the coupling, and where it is lazy tells its own sign
    asked = (columns if "coupling_ptr" in names else 0) + ("x_scale_ptr" in names)
    return matrices | lazy | {"x_ptr": asked}


def again_in_dense_layers(kernel, sizes):
    """As :func:`again`. A pixel is asked for by its neighbours, which are fewer at the border of an image."""
    rows = ceil(sizes["M"], sizes["BLOCK_M"])
    if kernel == "dense_conv1x1_backward_kernel":
        columns = ceil(channels(sizes, "C"), sizes["BLOCK_C"])
        return {"g_ptr": columns, "z_ptr": columns, "weight_ptr": rows}
    pairs = (3 * sizes["H"] - 2) * (3 * sizes["W"] - 2) / (sizes["H"] * sizes["W"])
    if kernel == "dense_conv3x3_kernel":
        return {"z_ptr": pairs * ceil(channels(sizes, "G"), sizes["BLOCK_N"]), "weight_ptr": rows}
    columns = pairs * ceil(channels(sizes, "K"), sizes["BLOCK_N"])
    gradient = {"grad_ptr": columns, "y_ptr": columns}
    if kernel == "dense_conv3x3_dgrad_kernel":
        return gradient | {"weight_ptr": rows}
    return gradient | {"z_ptr": 3 * ceil(channels(sizes, "G"), sizes["BLOCK_K"])}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One row for each call, all from one process."""
    return rows_for_all("script_counting.py", tmp_path_factory, interpret=True)


def label(row):
    return f"{row['op']} ({row['options']}), {row['layer']}"


def buffers(row, *kinds):
    """(launch, name, buffer) of all buffers of these kinds."""
    for launch in row["launches"]:
        yield from ((launch, name, b) for name, b in launch["buffers"].items() if b["kind"] in kinds)


def unique(row, *kinds):
    """Bytes that a call moves when what a launch reads again comes out of L2."""
    return sum(b["read"][0] + b["written"][0] for _, _, b in buffers(row, *kinds))


def issued(row, *kinds):
    return sum(b["read"][1] + b["written"][1] for _, _, b in buffers(row, *kinds))


def predicted(row):
    """What would be issued for tensors, from the sizes of a launch's arguments, in shares of what is declared."""
    total = 0
    for launch, name, b in buffers(row, "tensors"):
        sizes, (strided, read, *image) = launch["sizes"], STRIDED.get(launch["kernel"], ("", ""))
        share = sizes[read] / (sizes[image[0]] * sizes[image[1]]) if name == strided else 1
        total += b["size"] * share * again(launch["kernel"], sizes, launch["buffers"]).get(name, 1)
    return total / row["declared"]


def overhead(row):
    """Upper bound for what is not declared, from the sizes of a launch's arguments: all of each, in each launch."""
    kinds = ["workspace"] if row["op"] in SMALL else ["vectors", "workspace"]
    return sum(b["size"] for _, _, b in buffers(row, *kinds)) / row["declared"]


def of_layer(rows, *layers, small=False):
    return (row for row in rows if row["layer"] in layers and (row["op"] in SMALL) == small)


def test_every_op_is_counted_in_every_layer(rows):
    layers = {row["layer"] for row in rows}
    wanted = {(op, layer) for op in room.OPS for layer in layers if op not in NARROW or layer != "7x7"}
    assert {(row["op"], row["layer"]) for row in rows} == wanted


def test_tensors_move_once_as_declared(rows):
    """To the byte: one read of each input, of the pixels that a stride leaves, and one write of each result."""
    for row in of_layer(rows, "toy", "odd"):
        assert unique(row, "tensors") == row["declared"], f"{label(row)}: {unique(row, 'tensors') / row['declared']}"


def test_small_ops_move_what_they_declare(rows):
    """To the byte; vectors are part of it."""
    for row in of_layer(rows, "toy", "odd", small=True):
        moved = unique(row, "tensors", "vectors")
        assert moved == row["declared"], f"{label(row)}: {moved / row['declared']}"


def test_workspace_is_written_by_one_launch_and_read_by_another(rows):
    """Whole; only columns of a Gram matrix that do not exist are written and not read."""
    for row in (row for row in rows if row["layer"] in ("toy", "odd")):
        for launch, name, b in buffers(row, "workspace"):
            (read, _), (written, _) = b["read"], b["written"]
            assert written in (0, b["size"]), f"{label(row)}: {launch['kernel']} does not fill {name}"
            assert (read == 0) != (written == 0), f"{label(row)}: {launch['kernel']} reads and writes {name}"
            assert row["layer"] == "odd" or read in (0, b["size"]), f"{label(row)}: {name} is read in part"


def test_vectors_and_partial_sums_are_small(rows):
    for row in (row for row in rows if row["layer"] == "56x56"):
        assert overhead(row) < OVERHEAD, f"{label(row)}: {overhead(row):.2%} beside what is declared"
    for row in rows:
        biggest = max((b["size"] for _, _, b in buffers(row, "workspace")), default=0)
        assert biggest < WORKSPACE_BYTES, f"{label(row)}: {biggest} bytes of partial sums"


def test_reads_repeat_as_the_tiling_says(rows):
    """What L1 and L2 serve: x once for each tile of columns, a matrix once for each tile of rows, all else once."""
    for row in of_layer(rows, "toy", "odd"):
        for launch, name, b in buffers(row, "tensors"):
            expected = again(launch["kernel"], launch["sizes"], launch["buffers"]).get(name, 1)
            for way in ("read", "written"):
                once, asked = b[way]
                assert asked == pytest.approx(expected * once), (
                    f"{label(row)}: {name} is {way} {asked / once} times, not {expected}"
                )


def test_table(rows):
    """For the reader (pytest -rP), in shares of what is declared: what tensors move, and what the rest adds.

    Issued bytes beyond 1 come out of L1 and L2; in the large layers they follow from the tiling, which the test before
    this one confirms.
    """
    print(f"{'':65} {'tensors':>7} {'issued':>7}   {'at 56x56: issued, rest':22}   {'at 7x7: issued, rest':20}")
    large = {(row["op"], row["options"], row["layer"]): row for row in rows}
    for row in of_layer(rows, "toy"):
        op, options, declared = row["op"], row["options"], row["declared"]
        moved, asked = unique(row, "tensors") / declared, issued(row, "tensors") / declared
        assert predicted(row) == pytest.approx(asked), label(row)
        wide, deep = (large.get((op, options, layer)) for layer in ("56x56", "7x7"))
        deep = f"{predicted(deep):11.2f} {overhead(deep):8.2%}" if deep else ""
        print(
            f"{op:23} {options:41} {moved:7.3f} {asked:7.2f}   {predicted(wide):13.2f} {overhead(wide):8.2%}   {deep}"
        )
