"""tools/main_loop.py: what counts as the loop, and where its parts begin."""

import pytest

from tools import main_loop

LISTING = """
        /*0000*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], RZ, !UPT ;
.L_x_1:
        /*0010*/                   LDG.E R5, desc[UR20][R12.64] ;
        /*0020*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   UIADD3 UR7, UR7, 0x1, URZ ;
        /*0040*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], RZ, !UPT ;
        /*0060*/                   LDG.E R91, desc[UR38][R16.64] ;
        /*0070*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   FFMA R92, R91.reuse, R12.reuse, -R24 ;
        /*00a0*/                   FMNMX R92, R92, R25, PT ;
        /*00b0*/              @P1 STG.E desc[UR38][R8.64], R31 ;
        /*00c0*/              @!P1 BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R16 ;
        /*00e0*/                   BRA `(.L_x_3) ;
"""


def test_parts_of_the_loop():
    assert main_loop.counts(LISTING) == {
        "before": {"all": 2, "uniform": 1, "other": 1},
        "product": {"all": 4, "HGMMA": 2, "global memory": 1, "other": 1},
        "after": {"all": 4, "multiply, add": 1, "minimum": 1, "global memory": 1, "other": 1},
    }


def test_a_kernel_without_a_product():
    with pytest.raises(SystemExit, match="no loop with HGMMA"):
        main_loop.counts(LISTING.replace("HGMMA", "HMMA"))
